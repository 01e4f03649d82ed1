"""Checks examples/trainer.py.

    trainer.py REPOSITORY DATA DIAL FIXED

DATA (npz) has inputs of the model that DIAL and FIXED train: the first is to be told to keep what the second was made to,
0.5 of the patches and 0.3 of the connections between them."""
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(sys.argv[1])
sys.path[:0] = [str(REPOSITORY / "examples"), str(REPOSITORY / "fixtures/oracle")]

from oracle import example_level, trilevel  # noqa: E402
from trainer import Examples, Trainer, keep_ratio  # noqa: E402

RATE = 1e-3
# Losses may differ by float32 roundings of other fusions, which three steps of AdamW make larger where gradients are no
# larger than roundings.
TOLERANCE = 1e-5


def dials(data: Path, dial: Path, fixed: Path) -> None:
    dial, fixed = Trainer(dial, threads=1), Trainer(fixed, threads=1)
    arrays = np.load(data)
    (name,) = fixed.manifest["inputs"]
    assert dial.manifest["inputs"] == [name] and not fixed.manifest["dials"]
    images = next(arrays[key] for key in arrays if arrays[key].ndim == 4)
    inputs, labels = {name: images}, np.arange(len(images))
    told = {**inputs, "keep": 0.5, "attention_keep": 0.3}

    before = fixed.evaluate(inputs, labels)
    assert dial.evaluate(inputs, labels) == before, "what is evaluated is the original"
    left_alone, of_setting = dial.accumulate(inputs, labels), dial.accumulate(told, labels)
    assert abs(left_alone - of_setting) > 1e-3, "what is told acts"
    # What was added up there is no part of the steps that follow.
    dial.sums, dial.batches = dict(dial.zeros), 1
    for step in range(3):
        if step == 1:
            assert abs(dial.accumulate(told, labels) - fixed.accumulate(inputs, labels)) < TOLERANCE
        losses = dial.step(told, labels, RATE), fixed.step(inputs, labels, RATE)
        assert abs(losses[0] - losses[1]) < TOLERANCE * losses[1], losses
        assert dial.correct.shape == labels.shape and dial.correct.dtype == bool
    assert fixed.evaluate(inputs, labels)[0] < before[0], "it learns"
    assert fixed.evaluate(inputs, labels)[1] == fixed.correct.sum()


def examples() -> None:
    count, aside, period, leaving = 60, 25, 5, 10
    random, own = np.random.default_rng(7), np.random.default_rng(3)
    chosen = Examples(count, aside, period, seed=3)
    training, pool = example_level.initial_split(own.permutation(count), aside)
    for _ in range(4):
        assert set(chosen.training) == set(training) and set(chosen.aside) == set(pool)
        seen = {int(one): [] for one in sorted(training)}
        # Some are learned for good, some forgotten again and again, some never learned.
        ease = random.choice([0.0, 0.5, 0.9, 1.0], count)
        for _ in range(period):
            epoch, same = chosen.epoch(), own.permutation(chosen.training)
            assert (epoch == same).all() and sorted(epoch) == sorted(training)
            for batch in np.array_split(epoch, 4):
                correct = random.random(len(batch)) < ease[batch]
                chosen.record(batch, correct)
                for one, right in zip(batch, correct):
                    seen[int(one)].append(int(right))
        records = {one: example_level.forgetting_record(history, period) for one, history in seen.items()}
        ids, counts = example_level.forgetting_counts([records], period)
        assert len(set(counts)) > 2
        ordered, _ = example_level.order_by_forgetting(ids, counts)
        number = min(leaving, len(pool))
        training, pool = example_level.swap(training, pool, ordered, number, pool_order=own.permutation(len(pool)))
        chosen.swap(leaving)
        assert (chosen.training == training).all() and (chosen.aside == pool).all()
    few = Examples(10, 2)
    few.swap(5)
    assert len(few.training) == 8 and len(few.aside) == 2


def ratios() -> None:
    for base in (0.5, 0.7):
        for iteration in range(0, 1300, 7):
            expected = trilevel.keep_ratio(iteration, iteration // 10, 10, base)
            assert abs(keep_ratio(iteration / 10, base) - expected) < 1e-12


dials(*map(Path, sys.argv[2:5]))
examples()
ratios()
