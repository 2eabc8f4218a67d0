"""The exchange of `compression="int8"` and `"int4"` in float64 NumPy, as docs/compression.md describes it."""

import numpy as np

FORMATS = {"int8": (256, 127), "int4": (32, 7)}  # block, levels
SENT = 0.25  # of a residual, in each update

_H = np.array([[1.0]])
while len(_H) < 32:
    _H = np.kron(_H, np.array([[1.0, 1.0], [1.0, -1.0]]))


class Oracle:
    """All ranks of one bucket.

    Attributes:
        worker: [ranks, padded], residuals; of the part of the sum of each rank, rotated: server, [ranks, part].
        margin: smallest distance of a number that was rounded from the middle between two codes. The codes of
            float32 arithmetic are the same if it is much larger than float32's rounding.
    """

    def __init__(self, compression, ranks, elements):
        self.compression = compression
        self.block, self.levels = FORMATS[compression]
        step = ranks * self.block
        self.worker = np.zeros((ranks, -(-elements // step) * step))
        self.server = np.zeros((ranks, self.worker.shape[1] // ranks))
        self.margin = 0.5

    def mean(self, gradients, *, scatter=False):
        """Returns what the ranks get of their gradients, [ranks, elements].

        Args:
            gradients: of all ranks.
            scatter: the first phase alone, as with `strategy="sharded"`.
        """
        ranks, elements = gradients.shape
        decoded = np.zeros_like(self.worker)
        for rank, gradient in enumerate(gradients):
            padded = np.zeros(self.worker.shape[1])
            padded[:elements] = gradient
            h = padded / ranks + self.worker[rank]
            t = h - (1 - SENT) * self.worker[rank]
            unsent = (padded.reshape(-1, self.block) == 0).all(axis=1)
            decoded[rank] = self._coded(self._rotated(t), unsent)
            own = np.arange(len(h)).reshape(ranks, -1)[rank]  # what this rank adds itself needs no codes
            decoded[rank, own] = self._rotated(h[own])
            self.worker[rank] = h - self._back(decoded[rank])
            self.worker[rank, own] = 0
        parts = decoded.sum(axis=0).reshape(ranks, -1)
        total = parts.copy()
        for rank, part in enumerate([] if scatter else parts):
            h = part + self.server[rank]
            t = h - (1 - SENT) * self.server[rank]
            total[rank] = self._coded(t, np.zeros(len(t) // self.block, bool))
            self.server[rank] = h - total[rank]
        return self._back(total.reshape(-1))[:elements]

    def unsent(self):
        """Returns the sum of all residuals."""
        return self.worker.sum(axis=0) + self._back(self.server.reshape(-1))

    def rounding(self, change):
        """Returns by how much the codes of a change of parameters may miss each of its elements.

        Half a step of their block, which is rounded up to bfloat16. With int4 it is one of the transform, of which
        32 are added and divided by 32.
        """
        padded = np.zeros(-(-len(change) // self.block) * self.block)
        padded[: len(change)] = change
        largest = np.abs(self._rotated(padded)).reshape(-1, self.block).max(axis=1)
        return np.repeat(largest / (self.levels + 0.5) / 2 * (1 + 2**-7), self.block)[: len(change)]

    def _coded(self, t, unsent):
        blocks = t.reshape(-1, self.block)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        sent = (largest >= 2.0**-100) & ~unsent[:, None]
        fraction, exponent = np.frexp(np.where(sent, largest, 1.0) / (self.levels + 0.5))
        scale = np.ldexp(np.ceil(fraction * 256) / 256, exponent)  # rounded up to the 8 bits of bfloat16
        exact = np.clip(np.where(sent, blocks / scale, 0.0), -self.levels, self.levels)
        codes = np.rint(exact)
        self.margin = min(self.margin, (0.5 - np.abs(exact - codes)).min())
        return (codes * scale).reshape(-1)

    def _rotated(self, h):
        return (h.reshape(-1, 32) @ _H).reshape(-1) if self.compression == "int4" else h

    def _back(self, t):
        return (t.reshape(-1, 32) @ _H / 32).reshape(-1) if self.compression == "int4" else t
