"""How a Vision Transformer trains, in float64 and numpy alone: loss and gradients written out by hand, AdamW as PyTorch
has it. The models are those of fixtures/oracle/oracle/vit.py with a class token and no reduction.

    vit_training.py gradients WEIGHTS IMAGES LABELS OUT HEADS
    vit_training.py model OUT
    vit_training.py train MODEL OUT HEADS STEPS RATE DECAY CLIP BATCH all|matrices

`gradients` writes (npz) what others have computed too: by parameter, the gradients for `in_images` of IMAGES and `labels`
of LABELS. `model` makes a ViT-Ti of 12 blocks for small images, as if at the beginning of a training. `train` writes (npz)
a few batches drawn at random, over and over, `images` and `labels`, and what a training on them gives: `losses`, and `param.NAME`, the
parameters after all steps. CLIP bounds the norm of all gradients together; 0 does not. Either all parameters decay, or the
matrices of linear layers alone."""
import math
import sys
from pathlib import Path
from typing import Dict, Tuple

import numpy as np

EPS = 1e-6
BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
EPOCH = 5
erf = np.vectorize(math.erf)

Arrays = Dict[str, np.ndarray]


class Gradients:
    """Loss and gradients of one batch: each method computes a layer and gives how gradients pass it."""

    def __init__(self, w: Arrays, heads: int):
        self.w, self.heads, self.found = w, heads, {}
        self.embed = next(name for name in w if name.startswith("patch_embed.")).rsplit(".", 1)[0]

    def add(self, name: str, gradient: np.ndarray) -> None:
        self.found[name] = self.found.get(name, 0) + gradient.reshape(self.w[name].shape)

    def linear(self, name: str, x: np.ndarray):
        weight = self.w[f"{name}.weight"].reshape(len(self.w[f"{name}.weight"]), -1)

        def back(dy):
            rows = dy.reshape(-1, dy.shape[-1])
            self.add(f"{name}.weight", rows.T @ x.reshape(-1, x.shape[-1]))
            self.add(f"{name}.bias", rows.sum(0))
            return dy @ weight

        return x @ weight.T + self.w[f"{name}.bias"], back

    def norm(self, name: str, x: np.ndarray):
        centred = x - x.mean(-1, keepdims=True)
        rate = 1 / np.sqrt((centred ** 2).mean(-1, keepdims=True) + EPS)
        unit = centred * rate

        def back(dy):
            self.add(f"{name}.weight", (dy * unit).reshape(-1, x.shape[-1]).sum(0))
            self.add(f"{name}.bias", dy.reshape(-1, x.shape[-1]).sum(0))
            dunit = dy * self.w[f"{name}.weight"]
            mean = dunit.mean(-1, keepdims=True)
            return rate * (dunit - mean - unit * (dunit * unit).mean(-1, keepdims=True))

        return unit * self.w[f"{name}.weight"] + self.w[f"{name}.bias"], back

    def attention(self, name: str, x: np.ndarray):
        b, t, d = x.shape
        part = d // self.heads
        joint, joint_back = self.linear(f"{name}.qkv", x)
        q, k, v = joint.reshape(b, t, 3, self.heads, part).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) * part ** -0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out, out_back = self.linear(f"{name}.proj", (weights @ v).transpose(0, 2, 1, 3).reshape(b, t, d))

        def back(dy):
            dmixed = out_back(dy).reshape(b, t, self.heads, part).transpose(0, 2, 1, 3)
            dweights = dmixed @ v.swapaxes(-1, -2)
            dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * part ** -0.5
            parts = np.stack([dscores @ k, dscores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ dmixed])
            return joint_back(parts.transpose(1, 3, 0, 2, 4).reshape(b, t, 3 * d))

        return out, back

    def mlp(self, name: str, x: np.ndarray):
        inner, inner_back = self.linear(f"{name}.fc1", x)
        share = 0.5 * (1 + erf(inner / math.sqrt(2)))
        out, out_back = self.linear(f"{name}.fc2", inner * share)
        slope = share + inner * np.exp(-inner ** 2 / 2) / math.sqrt(2 * math.pi)
        return out, lambda dy: inner_back(out_back(dy) * slope)

    def loss(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The mean cross-entropy; the gradients are in `found` then."""
        b, c, height, width = images.shape
        p = self.w[f"{self.embed}.weight"].shape[-1]
        cells = images.reshape(b, c, height // p, p, width // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
        x, embed_back = self.linear(self.embed, cells)
        cls = np.broadcast_to(self.w["cls_token"], (b, 1, x.shape[-1]))
        x = np.concatenate([cls, x], 1) + self.w["pos_embed"]
        backs = []
        depth = 1 + max(int(name.split(".")[1]) for name in self.w if name.startswith("blocks."))
        for i in range(depth):
            for norm, branch, name in (("norm1", self.attention, "attn"), ("norm2", self.mlp, "mlp")):
                y, norm_back = self.norm(f"blocks.{i}.{norm}", x)
                y, branch_back = branch(f"blocks.{i}.{name}", y)
                x = x + y
                backs.append((norm_back, branch_back))
        y, norm_back = self.norm("norm", x)
        logits, head_back = self.linear("head", y[:, 0])
        shifted = logits - logits.max(-1, keepdims=True)
        log = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        rows = np.arange(b)

        dlogits = np.exp(log)
        dlogits[rows, labels] -= 1
        dy = np.zeros_like(y)
        dy[:, 0] = head_back(dlogits / b)
        dx = norm_back(dy)
        for norm_back, branch_back in reversed(backs):
            dx = dx + norm_back(branch_back(dx))
        self.add("pos_embed", dx.sum(0))
        self.add("cls_token", dx[:, :1].sum(0))
        embed_back(dx[:, 1:])
        return -log[rows, labels].mean()


def adamw(w: Arrays, gradients: Arrays, moments: Tuple[Arrays, Arrays], step: int, rate: float, decays: Dict[str, float]) -> None:
    for name, gradient in gradients.items():
        mean, square = (moment.setdefault(name, np.zeros_like(gradient)) for moment in moments)
        mean += (1 - BETA1) * (gradient - mean)
        square += (1 - BETA2) * (gradient ** 2 - square)
        root = np.sqrt(square / (1 - BETA2 ** step)) + ADAM_EPS
        w[name] = w[name] * (1 - rate * decays[name]) - rate * mean / (1 - BETA1 ** step) / root


def known_gradients(weights: str, images: str, labels: str, out: str, heads: str) -> None:
    model = Gradients({name: value.astype(np.float64) for name, value in np.load(weights).items()}, int(heads))
    model.loss(np.load(images)["in_images"].astype(np.float64), np.load(labels)["labels"])
    np.savez(out, **model.found)


def make_model(out: str) -> None:
    import onnx
    from onnx import numpy_helper

    sys.path.insert(0, str(Path(__file__).parents[2] / "fixtures/oracle"))
    from make_vit import make_vit

    model = make_vit(depth=12, dim=192, heads=3, image=32, patch=16)
    for tensor in model.graph.initializer:
        if "norm" in tensor.name and tensor.name.endswith(".weight"):
            tensor.CopyFrom(numpy_helper.from_array(1 + numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, out)


def parameters_of(path: str) -> Arrays:
    """By name, matrices as PyTorch has them."""
    import onnx
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    kept = {name: array for name, array in arrays.items() if name.endswith((".weight", ".bias", "_token", "_embed"))}
    return {name: (array.T if array.ndim == 2 else array).astype(np.float64) for name, array in kept.items()}


def train(model: str, out: str, heads: str, steps: str, rate: str, decay: str, clip: str, batch: str, decaying: str) -> None:
    w = parameters_of(model)
    size = next(value.shape[-1] for name, value in w.items() if name.startswith("patch_embed.") and value.ndim == 4)
    side = size * math.isqrt(w["pos_embed"].shape[1] - 1)
    matrix = {name: value.ndim > 1 and name.endswith(".weight") for name, value in w.items()}
    decays = {name: float(decay) if decaying == "all" or matrix[name] else 0.0 for name in w}
    random = np.random.default_rng(7)
    images = random.standard_normal((EPOCH, int(batch), 3, side, side)).astype(np.float32)
    labels = random.integers(len(w["head.bias"]), size=(EPOCH, int(batch)))
    order = np.arange(int(steps)) % EPOCH
    images, labels = images[order], labels[order]
    result = {"images": images, "labels": labels, "losses": np.empty(int(steps))}
    moments: Tuple[Arrays, Arrays] = ({}, {})
    for step in range(int(steps)):
        pass_ = Gradients(w, int(heads))
        result["losses"][step] = pass_.loss(images[step].astype(np.float64), labels[step])
        found = pass_.found
        norm = math.sqrt(sum((gradient ** 2).sum() for gradient in found.values()))
        if 0 < float(clip) < norm:
            found = {name: gradient * (float(clip) / norm) for name, gradient in found.items()}
        adamw(w, found, moments, step + 1, float(rate), decays)
    result.update({f"param.{name}": value for name, value in w.items()})
    np.savez(out, **result)


if __name__ == "__main__":
    {"gradients": known_gradients, "model": make_model, "train": train}[sys.argv[1]](*sys.argv[2:])
