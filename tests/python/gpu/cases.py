"""Single operators on random operands: what is fed, models of one call, and what they must give, in float64.

The rules are those of tests/kernels.rs."""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple, Union

import numpy as np

from .wire import BFLOAT16, FLOAT, FLOAT16, INT64, Graph

Arrays = Dict[str, np.ndarray]

TYPES = {"float32": FLOAT, "float16": FLOAT16, "bfloat16": BFLOAT16}
# What values may differ from those in float64, relative to the largest. In float32: some roundings. In float16 and
# bfloat16 operands and results are exact to 11 and 8 bits, so that a result is half a unit of those off.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
# Decisions closer than this depend on the order in which a runtime adds up.
MARGIN = 1e-5


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` has."""
    values = values.astype(np.float32)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def apart(expected: np.ndarray, given: np.ndarray) -> float:
    """The largest difference, relative to the largest entry; infinite where shapes differ or something is no number."""
    if expected.shape != given.shape or not np.isfinite(given).all():
        return float("inf")
    largest = np.abs(expected).max(initial=0.0) or 1.0
    return float(np.abs(expected - given.astype(np.float64)).max(initial=0.0) / largest)


class Calls(Graph):
    """A model whose inputs and outputs are float32 or int64, whatever type the operators work in: numpy has no
    bfloat16, and casting a value to a type that has it changes nothing."""

    def feed(self, name: str, dtype: str, rank: int) -> str:
        self.input(name, FLOAT, [f"{name}{axis}" for axis in range(rank)])
        return name if dtype == "float32" else self.op("Cast", name, to=TYPES[dtype])

    def result(self, name: str, value: str, dtype: str, rank: int) -> None:
        """Makes a value an output."""
        out = INT64 if dtype == "int64" else FLOAT
        self.op("Cast", value, named=name, to=out)
        self.output(name, out, [f"{name}{axis}" for axis in range(rank)])


@dataclass(frozen=True)
class Merge:
    """One merge with everything that belongs to it: TokenSize, TokenMerge or TokenMergeDynamic, TokenAssign,
    TokenRestore, TokenMean."""

    seed: int
    batch: int
    tokens: int
    width: int
    heads: int
    head_dim: int
    r: int
    # Channels of the metric's operand before and behind the heads.
    at: int = 0
    behind: int = 0
    protect: int = 1
    suffix: int = 0
    dtype: str = "float32"
    metric_dtype: str = "float32"
    sized: bool = True
    dynamic: bool = False
    # Tokens that are copies of another, and tokens whose metric is zero, of every hundred.
    copies: int = 0
    zeros: int = 0

    @property
    def dtypes(self) -> Tuple[str, str]:
        return self.dtype, self.metric_dtype

    @property
    def operators(self) -> List[str]:
        merge = "TokenMergeDynamic" if self.dynamic else "TokenMerge"
        return ([] if self.sized else ["TokenSize"]) + [merge, "TokenAssign", "TokenRestore", "TokenMean"]

    @property
    def merged(self) -> int:
        """How many tokens merge."""
        return min(self.r, (self.tokens - self.protect - self.suffix) // 2)

    def feeds(self) -> Arrays:
        random = np.random.default_rng(self.seed)

        def noise(dtype: str, *shape: int) -> np.ndarray:
            return rounded(random.uniform(-1, 1, shape), dtype)

        metric = noise(self.metric_dtype, self.batch, self.tokens, self.at + self.heads * self.head_dim + self.behind)
        chance = random.integers(0, 100, (self.batch, self.tokens))
        for image, token in np.argwhere(chance < self.copies):
            metric[image, token] = metric[image, random.integers(self.tokens)]
        metric[(chance >= self.copies) & (chance < self.copies + self.zeros)] = 0
        feeds = {"x": noise(self.dtype, self.batch, self.tokens, self.width), "metric": metric}
        if self.sized:
            feeds["size"] = random.integers(1, 5, (self.batch, self.tokens, 1)).astype(np.float32)
        feeds["slots"] = noise(self.dtype, self.batch, self.tokens - self.merged, 3)
        feeds["table"] = noise(self.dtype, *([self.batch] if self.seed % 2 else []), self.tokens, 5)
        return feeds

    def save(self, path: Path, functions: Sequence[bytes]) -> None:
        calls = Calls()
        x, metric = calls.feed("x", self.dtype, 3), calls.feed("metric", self.metric_dtype, 3)
        size = calls.feed("size", "float32", 3) if self.sized else calls.ours("TokenSize", x, named=["ones"])[0]
        named = self.call(calls, x, metric, size)
        assign = calls.ours("TokenAssign", *named[2:], named=["slot_of_token"])[0]
        calls.ours("TokenRestore", calls.feed("slots", self.dtype, 3), assign, named=["spread"])
        table = calls.feed("table", self.dtype, 2 + self.seed % 2)
        calls.ours("TokenMean", table, assign, "sizes", named=["averaged"], dtype=TYPES[self.dtype])
        for name, value in [("y", "merged"), ("restored", "spread"), ("mean", "averaged")]:
            calls.result(name, value, self.dtype, 3)
        calls.result("size_out", "sizes", "float32", 3)
        for name, value in [("anchor", "anchors"), ("leaving", "left"), ("into", "joined"), ("assign", assign)]:
            calls.result(name, value, "int64", 2)
        calls.save(path, functions)

    def call(self, graph: Graph, x: str, metric: str, size: str) -> List[str]:
        attributes = {"protect": self.protect, "suffix": self.suffix, "heads": self.heads, "head_dim": self.head_dim,
                      "metric_at": self.at, "dtype": TYPES[self.dtype]}
        named = ["merged", "sizes", "anchors", "left", "joined"]
        if self.dynamic:
            return graph.ours("TokenMergeDynamic", x, metric, size, graph.ints(self.r), named=named, **attributes)
        return graph.ours("TokenMerge", x, metric, size, named=named, r=self.r, tokens=self.tokens, **attributes)

    def save_alone(self, path: Path, functions: Sequence[bytes]) -> None:
        """The merge and nothing else; operands have the types that they are merged in."""
        graph = Graph()
        x, metric = (graph.input(name, TYPES[dtype], [self.batch, self.tokens, f"{name}_width"])
                     for name, dtype in [("x", self.dtype), ("metric", self.metric_dtype)])
        named = self.call(graph, x, metric, graph.input("size", FLOAT, [self.batch, self.tokens, 1]))
        for name, dtype in zip(named, [TYPES[self.dtype], FLOAT, INT64, INT64, INT64]):
            graph.output(name, dtype, [f"{name}{axis}" for axis in range(2 if dtype == INT64 else 3)])
        graph.save(path, functions)

    def reference(self, feeds: Arrays) -> "MergeReference":
        return MergeReference(self, feeds)


@dataclass
class Verdict:
    """What a check found: what is wrong, how far values are off, and images that float32 cannot decide."""

    wrong: List[str] = field(default_factory=list)
    error: float = 0.0
    images: int = 0
    close: int = 0

    def value(self, name: str, expected: np.ndarray, given: np.ndarray, tolerance: float) -> None:
        error = apart(expected, given)
        self.error = max(self.error, error)
        if not error <= tolerance:
            self.wrong.append(f"{name} is {error:.1e} off, {tolerance:.1e} is allowed")


class MergeReference:
    def __init__(self, case: Merge, feeds: Arrays) -> None:
        self.case, self.feeds = case, feeds
        heads = feeds["metric"][:, :, case.at : case.at + case.heads * case.head_dim].astype(np.float64)
        rows = heads.reshape(case.batch, case.tokens, case.heads, case.head_dim).mean(axis=2)
        self.images = [Image(case, image) for image in rows]

    def check(self, outputs: Arrays, body: bool) -> Verdict:
        """Checks outputs: image for image, the decisions must be as good as the best within the margin, and the best
        where nothing is closer than that; what was merged must be what they say."""
        case, feeds, verdict = self.case, self.feeds, Verdict()
        size = feeds.get("size", np.ones((case.batch, case.tokens, 1))).astype(np.float64)
        x, table = feeds["x"].astype(np.float64), feeds["table"].astype(np.float64)
        table = np.broadcast_to(table, (case.batch, *table.shape[-2:]))
        wanted: Dict[str, List[np.ndarray]] = {name: [] for name in ("y", "size_out", "restored", "mean")}
        for number, image in enumerate(self.images):
            anchor, leaving, into, assign = (outputs[name][number] for name in ("anchor", "leaving", "into", "assign"))
            decided = image.is_decided(equal_rows_tie=not body)
            verdict.images, verdict.close = verdict.images + 1, verdict.close + (not decided)
            wrong = image.check(anchor, leaving, into, assign, decided)
            if wrong:
                verdict.wrong.append(f"image {number}: {wrong}")
                return verdict
            count = size[number][anchor]
            np.add.at(count, into, size[number][leaving])
            for name, values in (("y", x[number]), ("mean", table[number])):
                # The mean of a table is its sum over the tokens of a slot, divided by the size that is given.
                weights = size[number] if name == "y" else np.ones_like(size[number])
                sums = weights[anchor] * values[anchor]
                np.add.at(sums, into, weights[leaving] * values[leaving])
                wanted[name].append(sums / count)
            wanted["size_out"].append(count)
            wanted["restored"].append(feeds["slots"][number][assign])
        tolerance = {"size_out": TOLERANCE["float32"], "restored": 0.0}
        for name, images in wanted.items():
            verdict.value(name, np.stack(images), outputs[name], tolerance.get(name, TOLERANCE[case.dtype]))
        return verdict


class Image:
    """Bipartite soft matching of one image."""

    def __init__(self, case: Merge, rows: np.ndarray) -> None:
        self.case, self.r = case, case.merged
        free = np.arange(case.protect, case.tokens - case.suffix)
        self.a, self.b = free[free % 2 == 0], free[free % 2 == 1]
        # By distinct rows, so that equal rows are equally similar to everything, to the last bit.
        distinct, row_of = np.unique(rows, axis=0, return_inverse=True)
        self.row_of = row_of.reshape(-1)
        norms = np.sqrt((distinct * distinct).sum(axis=1, keepdims=True))
        unit = np.divide(distinct, norms, out=np.zeros_like(distinct), where=norms > 0)
        a_rows, a_back = np.unique(self.row_of[self.a], return_inverse=True)
        b_rows, b_back = np.unique(self.row_of[self.b], return_inverse=True)
        self.cosine = (unit[a_rows] @ unit[b_rows].T)[a_back][:, b_back]
        self.best, self.partner = self.cosine.max(axis=1), self.cosine.argmax(axis=1)
        self.order = np.argsort(-self.best, kind="stable")

    def anchors(self) -> np.ndarray:
        staying = self.a[self.order[self.r :]]
        staying = np.sort(staying) if self.case.protect else staying
        tokens = np.arange(self.case.tokens)
        end = self.case.tokens - self.case.suffix
        return np.concatenate([tokens[: self.case.protect], staying, self.b, tokens[end:]])

    def is_decided(self, equal_rows_tie: bool) -> bool:
        """Whether float32 decides as float64 does: no two candidates are closer than the margin, but those of equal
        rows if equal rows are sure to have equal similarities."""
        close = self.cosine >= self.best[:, None] - MARGIN
        close[np.arange(len(self.a)), self.partner] = False
        a, b = np.nonzero(close)
        row_a, row_b = self.row_of[self.a], self.row_of[self.b]
        if len(a) and not (equal_rows_tie and (row_b[b] == row_b[self.partner[a]]).all()):
            return False
        # Which tokens leave matters, in which order does not. Those that stay are sorted by position, unless nothing
        # is protected.
        score = self.best[self.order]
        for at in range(len(score) if self.case.protect == 0 else self.r):
            rival = self.r if at < self.r else at + 1
            while rival < len(score) and score[at] - score[rival] <= MARGIN:
                one, other = self.order[at], self.order[rival]
                same = row_a[one] == row_a[other] and self.partner[one] == self.partner[other]
                if not (equal_rows_tie and same):
                    return False
                rival += 1
        return True

    def check(self, anchor: np.ndarray, leaving: np.ndarray, into: np.ndarray, assign: np.ndarray,
              decided: bool) -> str:
        """What is wrong with a grouping, "" if nothing."""
        case, best = self.case, self.anchors()
        first, last = case.protect, case.tokens - self.r - case.suffix - len(self.b)
        listed = np.sort(np.concatenate([anchor, leaving]))
        if len(anchor) != len(best) or not np.array_equal(listed, np.arange(case.tokens)):
            return "no grouping of all tokens"
        fixed = np.array_equal(anchor[:first], best[:first]) and np.array_equal(anchor[last:], best[last:])
        if not fixed or (into < 0).any() or (into >= len(anchor)).any():
            return "slots are out of place"
        slot_of = np.empty(case.tokens, np.int64)
        slot_of[anchor], slot_of[leaving] = np.arange(len(anchor)), into
        if not np.array_equal(slot_of, assign):
            return "assign contradicts anchor, leaving and into"
        a, b = np.searchsorted(self.a, leaving), np.searchsorted(self.b, anchor[into])
        if not np.isin(leaving, self.a).all() or not np.isin(anchor[into], self.b).all():
            return "tokens joined that may not"
        weakest = self.best[self.order[self.r - 1]] if self.r else -np.inf
        own = self.cosine[a, b]
        if (own + MARGIN < self.best[a]).any() or (own + MARGIN < weakest).any():
            return "there were better pairs"
        if case.protect and (np.diff(anchor[first:last]) <= 0).any():
            return "staying tokens are not in order"
        if decided:
            left = self.order[: self.r]
            slots = {token: slot for slot, token in enumerate(best)}
            pairs = {(self.a[one], slots[self.b[self.partner[one]]]) for one in left}
            if not np.array_equal(anchor, best) or set(zip(leaving, into)) != pairs:
                return "another grouping, and no decision was close"
        return ""


@dataclass(frozen=True)
class Attend:
    """Attention and ProportionalAttention."""

    seed: int
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    # Channels before the heads of queries, keys and values.
    at: Tuple[int, int, int] = (0, 0, 0)
    dtype: str = "float32"
    # One tensor for queries, keys and values.
    joint: bool = False
    # How far scores range.
    sharpness: float = 3.0

    operators = ["Attention", "ProportionalAttention"]

    @property
    def dtypes(self) -> Tuple[str, ...]:
        return (self.dtype,)

    @property
    def starts(self) -> List[int]:
        q, k, v = self.at
        width = self.heads * self.head_dim
        return [q, q + width + k, q + 2 * width + k + v] if self.joint else [q, k, v]

    @property
    def scale(self) -> float:
        return float(np.float32(self.sharpness / self.head_dim**0.5))

    def feeds(self) -> Arrays:
        random = np.random.default_rng(self.seed)

        def noise(*shape: int) -> np.ndarray:
            return rounded(random.uniform(-1, 1, shape), self.dtype)

        width = self.heads * self.head_dim
        if self.joint:
            feeds = {"qkv": noise(self.batch, self.queries, self.starts[2] + width + self.seed % 3)}
        else:
            counts = (self.queries, self.keys, self.keys)
            feeds = {name: noise(self.batch, count, at + width) for name, count, at in zip("qkv", counts, self.at)}
        feeds["size"] = random.integers(1, 10, (self.batch, self.keys, 1)).astype(np.float32)
        return feeds

    def save(self, path: Path, functions: Sequence[bytes]) -> None:
        calls = Calls()
        operands = [calls.feed("qkv", self.dtype, 3)] * 3 if self.joint else \
            [calls.feed(name, self.dtype, 3) for name in "qkv"]
        size = calls.feed("size", "float32", 3)
        attributes = {"heads": self.heads, "head_dim": self.head_dim, "scale": self.scale, "dtype": TYPES[self.dtype]}
        attributes.update((f"{name}_at", at) for name, at in zip("qkv", self.starts))
        for name, inputs in [("Attention", operands), ("ProportionalAttention", [*operands, size])]:
            calls.result(name, calls.ours(name, *inputs, named=[f"{name}_y"], **attributes)[0], self.dtype, 3)
        calls.save(path, functions)

    def reference(self, feeds: Arrays) -> "AttendReference":
        return AttendReference(self, feeds)


class AttendReference:
    """softmax(scale · q kᵀ + log(size)) v."""

    def __init__(self, case: Attend, feeds: Arrays) -> None:
        self.case = case
        plain = np.zeros((case.batch, case.queries, case.heads * case.head_dim))
        self.expected = {"Attention": plain, "ProportionalAttention": plain.copy()}
        operands = [feeds["qkv"]] * 3 if case.joint else [feeds[name] for name in "qkv"]
        for image in range(case.batch):
            for head in range(case.heads):
                channels = [slice(at + head * case.head_dim, at + (head + 1) * case.head_dim) for at in case.starts]
                q, k, v = (operand[image, :, at].astype(np.float64) for operand, at in zip(operands, channels))
                scores = case.scale * (q @ k.T)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                to = slice(head * case.head_dim, (head + 1) * case.head_dim)
                for name, share in [("Attention", 1.0), ("ProportionalAttention", feeds["size"][image, :, 0])]:
                    shares = weights * share
                    self.expected[name][image, :, to] = shares @ v / shares.sum(axis=1, keepdims=True)

    def check(self, outputs: Arrays, body: bool) -> Verdict:
        verdict = Verdict(images=self.case.batch)
        # The body's scores are rounded to the type of q, which the kernels never do.
        slack = 10 if body and self.case.dtype != "float32" else 1
        for name, expected in self.expected.items():
            verdict.value(name, expected, outputs[name], slack * TOLERANCE[self.case.dtype])
        return verdict


@dataclass(frozen=True)
class Score:
    """TokenScore."""

    seed: int
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    # How many queries are averaged.
    first: int = 1
    # Channels before the heads of queries and keys.
    at: Tuple[int, int] = (0, 0)
    dtype: str = "float32"
    # How far scores range.
    sharpness: float = 3.0

    operators = ["TokenScore"]

    @property
    def dtypes(self) -> Tuple[str, ...]:
        return (self.dtype,)

    @property
    def scale(self) -> float:
        return float(np.float32(self.sharpness / self.head_dim**0.5))

    def feeds(self) -> Arrays:
        random = np.random.default_rng(self.seed)
        width = self.heads * self.head_dim
        feeds = {name: rounded(random.uniform(-1, 1, (self.batch, count, at + width)), self.dtype)
                 for name, count, at in zip("qk", (self.queries, self.keys), self.at)}
        feeds["size"] = random.integers(1, 10, (self.batch, self.keys, 1)).astype(np.float32)
        return feeds

    def save(self, path: Path, functions: Sequence[bytes]) -> None:
        calls = Calls()
        q, k = (calls.feed(name, self.dtype, 3) for name in "qk")
        attributes = {"heads": self.heads, "head_dim": self.head_dim, "q_at": self.at[0], "k_at": self.at[1],
                      "scale": self.scale, "queries": self.first}
        received = calls.ours("TokenScore", q, k, calls.feed("size", "float32", 3), named=["received"], **attributes)
        calls.result("score", received[0], "float32", 2)
        calls.save(path, functions)

    def reference(self, feeds: Arrays) -> "ScoreReference":
        return ScoreReference(self, feeds)


class ScoreReference:
    """The mean of softmax(scale · q kᵀ + log(size)) over heads and queries."""

    def __init__(self, case: Score, feeds: Arrays) -> None:
        self.case, self.expected = case, np.zeros((case.batch, case.keys))
        chosen = min(case.first, case.queries)
        for image in range(case.batch):
            for head in range(case.heads):
                q, k = (feeds[name][image, :, at + head * case.head_dim : at + (head + 1) * case.head_dim]
                        .astype(np.float64) for name, at in zip("qk", case.at))
                scores = case.scale * (q[:chosen] @ k.T)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True)) * feeds["size"][image, :, 0]
                self.expected[image] += (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
        self.expected /= case.heads * chosen

    def check(self, outputs: Arrays, body: bool) -> Verdict:
        verdict = Verdict(images=self.case.batch)
        # Whatever the type, scores are float32 of operands that are exact.
        verdict.value("score", self.expected, outputs["score"], TOLERANCE["float32"])
        return verdict


@dataclass(frozen=True)
class Prune:
    """TokenPrune or TokenPruneDynamic."""

    seed: int
    batch: int
    tokens: int
    width: int
    keep: int
    protect: int = 1
    suffix: int = 0
    fuse: bool = True
    dtype: str = "float32"
    dynamic: bool = False
    # Scores that are copies of another, and scores that are no numbers, of every hundred.
    copies: int = 0
    nan: int = 0

    @property
    def dtypes(self) -> Tuple[str, ...]:
        return (self.dtype,)

    @property
    def operators(self) -> List[str]:
        return ["TokenPruneDynamic" if self.dynamic else "TokenPrune"]

    def feeds(self) -> Arrays:
        random = np.random.default_rng(self.seed)
        score = random.uniform(-1, 1, (self.batch, self.tokens)).astype(np.float32)
        chance = random.integers(0, 100, score.shape)
        for image, token in np.argwhere(chance < self.copies):
            score[image, token] = score[image, random.integers(self.tokens)]
        score[(chance >= self.copies) & (chance < self.copies + self.nan)] = np.nan
        x = rounded(random.uniform(-1, 1, (self.batch, self.tokens, self.width)), self.dtype)
        return {"x": x, "score": score, "size": random.integers(1, 5, (self.batch, self.tokens, 1)).astype(np.float32)}

    def save(self, path: Path, functions: Sequence[bytes]) -> None:
        calls = Calls()
        operands = [calls.feed("x", self.dtype, 3), calls.feed("score", "float32", 2), calls.feed("size", "float32", 3)]
        attributes = {"protect": self.protect, "suffix": self.suffix, "fuse": int(self.fuse),
                      "dtype": TYPES[self.dtype]}
        named = ["pruned", "sizes", "anchors", "slot_of_token"]
        if self.dynamic:
            calls.ours("TokenPruneDynamic", *operands, calls.ints(self.keep), named=named, **attributes)
        else:
            calls.ours("TokenPrune", *operands, named=named, keep=self.keep, tokens=self.tokens, **attributes)
        for name, value, dtype, rank in zip(["y", "size_out", "anchor", "assign"], named,
                                            [self.dtype, "float32", "int64", "int64"], [3, 3, 2, 2]):
            calls.result(name, value, dtype, rank)
        calls.save(path, functions)

    def reference(self, feeds: Arrays) -> "PruneReference":
        return PruneReference(self, feeds)


class PruneReference:
    def __init__(self, case: Prune, feeds: Arrays) -> None:
        self.case = case
        self.expected: Dict[str, np.ndarray] = {}
        images: Dict[str, List[np.ndarray]] = defaultdict(list)
        candidates = np.arange(case.protect, case.tokens - case.suffix)
        for x, score, size in zip(feeds["x"].astype(np.float64), feeds["score"], feeds["size"]):
            key = np.where(np.isnan(score), np.inf, score)[candidates]
            order = candidates[np.argsort(-key, kind="stable")]
            kept, dropped = order[: max(case.keep, 0)], order[max(case.keep, 0) :]
            fuses = case.fuse and len(dropped) > 0
            anchor = np.concatenate([np.arange(case.protect), kept, [-1] if fuses else [],
                                     np.arange(case.tokens - case.suffix, case.tokens)]).astype(np.int64)
            assign = np.full(case.tokens, case.protect + len(kept) if fuses else -1)
            slots = np.flatnonzero(anchor >= 0)
            assign[anchor[slots]] = slots
            y, sizes = x[anchor], np.where(anchor[:, None] < 0, 1, size[anchor])
            y[anchor < 0] = score[dropped].astype(np.float64) @ x[dropped]
            for name, value in [("y", y), ("size_out", sizes), ("anchor", anchor), ("assign", assign)]:
                images[name].append(value)
        self.expected = {name: np.stack(values) for name, values in images.items()}

    def check(self, outputs: Arrays, body: bool) -> Verdict:
        """Checks outputs: decisions, sizes and what is kept to the bit."""
        verdict = Verdict(images=self.case.batch)
        for name in ("anchor", "assign", "size_out"):
            if not np.array_equal(self.expected[name], outputs[name]):
                verdict.wrong.append(f"{name} differs")
        y, expected = outputs["y"], self.expected["y"]
        if verdict.wrong or y.shape != expected.shape:
            verdict.wrong.append("other tokens are kept")
            return verdict
        extra, none = self.expected["anchor"] < 0, np.isnan(expected)
        if not np.array_equal(y[~extra], expected[~extra]):
            verdict.wrong.append("tokens that are kept have changed")
        if not np.array_equal(np.isnan(y), none):
            verdict.wrong.append("other numbers are none")
        verdict.value("y", np.where(none, 0, expected), np.where(none, 0, y), TOLERANCE[self.case.dtype])
        return verdict


@dataclass(frozen=True)
class Mask:
    """ConnectionMask or ConnectionMaskDynamic."""

    seed: int
    batch: int
    heads: int
    tokens: int
    # Slots that keep the place of a token.
    free: int
    connections: int
    protect: int = 1
    suffix: int = 0
    dtype: str = "float32"
    dynamic: bool = False
    # Columns that are copies of another, and weights at the floor of a masked softmax, of every hundred.
    copies: int = 0
    floor: int = 0

    @property
    def dtypes(self) -> Tuple[str, ...]:
        return (self.dtype,)

    @property
    def operators(self) -> List[str]:
        return ["ConnectionMaskDynamic" if self.dynamic else "ConnectionMask"]

    @property
    def slots(self) -> int:
        return self.protect + self.free + self.suffix

    def feeds(self) -> Arrays:
        random = np.random.default_rng(self.seed)
        weights = random.uniform(0, 1, (self.batch, self.heads, self.tokens, self.tokens)).astype(np.float32)
        anchor = np.full((self.batch, self.slots), -1, np.int64)
        for image in range(self.batch):
            # In all heads alike, as masks are.
            weights[image][:, random.integers(0, 100, (self.tokens, self.tokens)) < self.floor] = 1e-3
            for column in np.flatnonzero(random.integers(0, 100, self.tokens) < self.copies):
                weights[image][:, :, column] = weights[image][:, :, random.integers(self.tokens)]
            anchor[image, self.protect : self.protect + self.free] = random.permutation(self.tokens)[: self.free]
        return {"weights": rounded(weights, self.dtype), "anchor": anchor}

    def save(self, path: Path, functions: Sequence[bytes]) -> None:
        calls = Calls()
        weights = calls.feed("weights", self.dtype, 4)
        anchor = calls.input("anchor", INT64, ["images", "slots"])
        places = {"protect": self.protect, "suffix": self.suffix}
        if self.dynamic:
            operands = [weights, anchor, calls.ints(self.connections)]
            made = calls.ours("ConnectionMaskDynamic", *operands, named=["made"], **places)
        else:
            made = calls.ours("ConnectionMask", weights, anchor, named=["made"], connections=self.connections,
                              slots=self.slots, **places)
        calls.result("mask", made[0], "float32", 3)
        calls.save(path, functions)

    def reference(self, feeds: Arrays) -> "MaskReference":
        return MaskReference(self, feeds)


class MaskReference:
    def __init__(self, case: Mask, feeds: Arrays) -> None:
        self.expected = np.ones((case.batch, case.slots, case.slots))
        # Connections of which float32 may say either: nearly as strong as the weakest that stays, and not because all
        # their weights are the same.
        self.close = np.zeros(self.expected.shape, bool)
        free = slice(case.protect, case.protect + case.free)
        for image in range(case.batch):
            anchor = feeds["anchor"][image, free]
            weights = feeds["weights"][image].astype(np.float64)[:, anchor[:, None], anchor]
            own = weights.mean(axis=0)
            at = min(max(case.connections, 1), case.free) - 1
            weakest = np.argsort(-own, axis=1, kind="stable")[:, at, None]
            least = np.take_along_axis(own, weakest, axis=1)
            equal = (weights == np.take_along_axis(weights, weakest[None], axis=2)).all(axis=0)
            self.expected[image, free, free] = equal | (own >= least)
            self.close[image, free, free] = ~equal & (np.abs(own - least) <= MARGIN * least)

    def check(self, outputs: Arrays, body: bool) -> Verdict:
        given = outputs["mask"]
        verdict = Verdict(images=len(given), close=int(self.close.any(axis=(1, 2)).sum()))
        if given.shape != self.expected.shape or not np.isin(given, (0, 1)).all():
            verdict.wrong.append("mask is none")
        elif ((given != self.expected) & ~self.close).any():
            verdict.wrong.append("other connections stay, and no decision was close")
        return verdict


@dataclass(frozen=True)
class Softmax:
    """MaskedSoftmax."""

    seed: int
    batch: int
    heads: int
    queries: int
    keys: int
    dtype: str = "float32"
    # How far scores range.
    sharpness: float = 3.0
    # Connections that are closed, of every hundred.
    closed: int = 30
    eps: float = float(np.float32(1e-6))

    operators = ["MaskedSoftmax"]

    @property
    def dtypes(self) -> Tuple[str, ...]:
        return (self.dtype,)

    def feeds(self) -> Arrays:
        random = np.random.default_rng(self.seed)
        scores = random.uniform(-self.sharpness, self.sharpness, (self.batch, self.heads, self.queries, self.keys))
        mask = random.integers(0, 100, (self.batch, self.queries, self.keys)) >= self.closed
        size = random.integers(1, 5, (self.batch, self.keys, 1))
        return {"scores": rounded(scores, self.dtype), "mask": mask.astype(np.float32), "size": size.astype(np.float32)}

    def save(self, path: Path, functions: Sequence[bytes]) -> None:
        calls = Calls()
        scores, mask = calls.feed("scores", self.dtype, 4), calls.feed("mask", "float32", 3)
        shares = calls.ours("MaskedSoftmax", scores, mask, calls.feed("size", "float32", 3), named=["shares"],
                            eps=self.eps, dtype=TYPES[self.dtype])
        calls.result("weights", shares[0], self.dtype, 4)
        calls.save(path, functions)

    def reference(self, feeds: Arrays) -> "SoftmaxReference":
        return SoftmaxReference(self, feeds)


class SoftmaxReference:
    """(e + eps / M) / (Σ e + eps) with e = exp(l + log(size) − peak) · mask."""

    def __init__(self, case: Softmax, feeds: Arrays) -> None:
        self.case = case
        sized = feeds["scores"].astype(np.float64) + np.log(feeds["size"].astype(np.float64))[:, None, None, :, 0]
        powers = np.exp(sized - sized.max(axis=-1, keepdims=True)) * feeds["mask"][:, None]
        self.expected = (powers + case.eps / case.keys) / (powers.sum(axis=-1, keepdims=True) + case.eps)

    def check(self, outputs: Arrays, body: bool) -> Verdict:
        """Checks outputs: every weight counts, so errors are relative to each, but for what float16 rounds to zero: the
        floor of closed connections, for one."""
        verdict, given, expected = Verdict(images=self.case.batch), outputs["weights"], self.expected
        if given.shape != expected.shape or not np.isfinite(given).all():
            verdict.wrong.append("weights are none")
            return verdict
        lost = 2.0**-25 if self.case.dtype == "float16" else 0.0
        errors = np.maximum(np.abs(given.astype(np.float64) - expected) - lost, 0) / expected
        verdict.error = float(errors.max(initial=0.0))
        if verdict.error > TOLERANCE[self.case.dtype]:
            verdict.wrong.append(f"weights are {verdict.error:.1e} off, {TOLERANCE[self.case.dtype]:.1e} is allowed")
        return verdict


Case = Union[Merge, Attend, Score, Prune, Mask, Softmax]

FLOATS = list(TYPES)
# More queries than there are.
EVERY = 2**63 - 1


def cases(count: int, quick: bool) -> Iterator[Case]:
    """Shapes of well-known models and edges of what kernels distinguish, then `count` random ones of each kind. The
    same in every run. `quick`: small ones alone, for tools that slow everything down."""
    if not quick:
        for number, dtype in enumerate(FLOATS):
            both = {"dtype": dtype, "metric_dtype": dtype, "seed": number}
            yield Merge(batch=2, tokens=197, width=768, heads=12, head_dim=64, at=768, behind=768, r=16, **both)
            yield Merge(batch=64, tokens=198, width=384, heads=6, head_dim=64, r=13, protect=2, **both)
            yield Merge(batch=2, tokens=577, width=1024, heads=16, head_dim=64, at=1024, behind=1024, r=23, **both)
            yield Merge(batch=1, tokens=1025, width=1664, heads=16, head_dim=104, r=512, **both)
            yield Merge(batch=1, tokens=4097, width=192, heads=3, head_dim=64, r=2048, **both)
            yield Attend(number, 2, 197, 197, 12, 64, joint=True, dtype=dtype)
            yield Attend(number, 1, 577, 577, 16, 64, joint=True, dtype=dtype)
            yield Attend(number, 64, 49, 49, 6, 64, joint=True, dtype=dtype)
            yield Attend(number, 1, 4097, 4097, 1, 32, joint=True, dtype=dtype)
            yield Attend(number, 2, 1, 4097, 3, 104, dtype=dtype)
            yield Attend(number, 2, 300, 77, 4, 80, dtype=dtype)
            for head_dim in (33, 40, 48, 72, 88, 96, 127, 128):
                yield Attend(number, 1, 70, 65, 2, head_dim, dtype=dtype)
            yield Score(number, 2, 197, 197, 12, 64, at=(0, 768), dtype=dtype)
            yield Score(number, 64, 50, 50, 6, 64, dtype=dtype)
            yield Score(number, 2, 577, 577, 16, 64, first=EVERY, dtype=dtype)
            yield Score(number, 1, 4097, 4097, 3, 72, first=EVERY, dtype=dtype)
            yield Prune(number, 2, 197, 768, keep=137, dtype=dtype)
            yield Prune(number, 64, 198, 384, keep=98, protect=2, fuse=False, dtype=dtype)
            yield Prune(number, 1, 1025, 1664, keep=700, dtype=dtype, dynamic=True)
            yield Prune(number, 1, 4097, 192, keep=2048, suffix=3, dtype=dtype)
            yield Mask(number, 2, 12, 197, free=138, connections=69, dtype=dtype)
            yield Mask(number, 64, 6, 50, free=35, connections=10, suffix=1, dtype=dtype, dynamic=True)
            yield Mask(number, 1, 16, 577, free=404, connections=121, floor=50, dtype=dtype)
            yield Mask(number, 1, 2, 2050, free=1435, connections=1000, dtype=dtype)
            yield Softmax(number, 2, 12, 139, 139, dtype=dtype)
            yield Softmax(number, 64, 6, 50, 50, closed=70, dtype=dtype)
            yield Softmax(number, 1, 16, 577, 577, dtype=dtype)
            yield Softmax(number, 1, 2, 300, 4097, closed=90, dtype=dtype)
        # More A tokens than are sorted in shared memory; heads wider than fit in it.
        yield Merge(5, 1, 8300, 16, 1, 8, r=100, protect=0)
        yield Merge(6, 2, 301, 40, 2, 160, r=60, protect=5, suffix=1)
        yield Prune(5, 1, 8300, 16, keep=4000, copies=50)
    yield Merge(1, 1, 3, 4, 1, 4, r=1)
    yield Merge(2, 2, 50, 8, 2, 8, r=0, dynamic=True)
    yield Merge(3, 2, 50, 8, 2, 8, r=99, dynamic=True, sized=False)
    random = np.random.default_rng(0)

    def pick(*choices):
        return choices[random.integers(len(choices))]

    def between(least: int, most: int) -> int:
        return int(random.integers(least, most + 1))

    most = 70 if quick else 210
    for seed in range(count):
        tokens, protect, suffix = between(3, pick(40, 40, 40, most)), pick(0, 1, 2, 5), pick(0, 0, 0, 1, 3)
        protect = min(protect, tokens - 2)
        suffix = min(suffix, tokens - protect - 2)
        cap = (tokens - protect - suffix) // 2
        yield Merge(seed, pick(1, 2, 3, pick(1, 8, 64)), tokens, between(1, pick(40, 300)), between(1, 4),
                    between(1, pick(20, 80)), r=pick(cap, between(1, cap), between(1, cap)), at=between(0, 5),
                    behind=between(0, 4), protect=protect, suffix=suffix, dtype=pick(*FLOATS),
                    metric_dtype=pick(*FLOATS), sized=pick(True, False), dynamic=pick(True, False),
                    copies=pick(0, between(0, 40)), zeros=pick(0, between(0, 10)))
        queries, joint = between(1, pick(40, 40, most)), pick(True, False)
        yield Attend(seed, pick(1, 2, 3), queries, queries if joint else between(1, pick(40, 40, most)), between(1, 4),
                     pick(between(1, 20), between(32, 128), 64), at=(between(0, 4), between(0, 4), between(0, 4)),
                     dtype=pick(*FLOATS), joint=joint, sharpness=float(random.uniform(0.1, 8)))
        yield Score(seed, pick(1, 2, 3), between(1, pick(40, 40, most)), between(1, pick(40, 40, most)), between(1, 4),
                    pick(between(1, 20), between(32, 128), 64), first=pick(1, 1, between(1, 60), EVERY),
                    at=(between(0, 4), between(0, 4)), dtype=pick(*FLOATS), sharpness=float(random.uniform(0.1, 8)))
        candidates, dynamic = tokens - protect - suffix, pick(True, False)
        keep = pick(0, candidates, between(0, candidates), between(0, candidates))
        yield Prune(seed, pick(1, 2, 3, pick(1, 8, 64)), tokens, between(1, pick(40, 300)),
                    keep + (between(-3, 3) if dynamic and keep in (0, candidates) else 0), protect=protect,
                    suffix=suffix, fuse=pick(True, False), dtype=pick(*FLOATS), dynamic=dynamic,
                    copies=pick(0, between(0, 60)), nan=pick(0, 0, between(0, 20)))
        heads, count = between(1, 12), between(1, pick(40, 40, most))
        free = between(1, count)
        yield Mask(seed, pick(1, 2, 3), heads, count, free, connections=between(0, free + 2), protect=pick(0, 1, 2, 5),
                   suffix=pick(0, 0, 1, 3), dtype=pick(*FLOATS), dynamic=pick(True, False),
                   copies=pick(0, between(0, 40)), floor=pick(0, between(0, 100)))
        yield Softmax(seed, pick(1, 2, 3), heads, between(1, pick(40, 40, most)), count, dtype=pick(*FLOATS),
                      sharpness=float(random.uniform(0.1, 12)), closed=pick(0, 100, between(0, 100)))
