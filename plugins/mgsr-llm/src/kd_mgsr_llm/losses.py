"""The clipped divergence and the agreement inside spans, as terms of an objective."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_llm_kd_suite.chunked import CHUNK, Scores, mean_over_tokens
from kd_llm_kd_suite.losses import need_labels
from kd_mgsr_llm.chunker import Spans
from kd_mgsr_llm.functional import common, dac_kl, span_correlation, span_pairs
from kd_mgsr_llm.modules import Levels
from kd_mgsr_llm.options import DACOptions, SpanOptions
from kdcore import Loss, Outputs
from kdcore.data import DataModule
from kdcore.errors import DataError
from kdcore.models import Batch


class DACKL(Loss):
    """Forward KL from the clipped teacher; mean over the positions that are not ignored, in nats.

    The network that sets the levels is trained with the student and left out of what is saved of it.

    Attributes:
        gold: whether the batch's tokens are those of the data, which are then never clipped.
    """

    def __init__(self, options: DACOptions | None = None) -> None:
        super().__init__()
        self.options = options or DACOptions()
        self.levels: Levels | None = None
        self.gold = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean."""
        if self.levels is None:
            o, inputs = self.options, Scores.of(student).inputs
            size = min(Scores.of(student).size, Scores.of(teacher).size)
            self.levels = Levels(size, o.topk, o.hidden, o.upper_start).to(inputs.device)
        return mean_over_tokens(self._rows, student, teacher, need_labels(batch), list(self.levels.parameters()))

    def _rows(self, ours: Tensor, theirs: Tensor | None, labels: Tensor) -> Tensor:
        assert theirs is not None
        assert self.levels is not None
        student, teacher = common(ours, theirs)
        lower, upper = self.levels(student, teacher)
        keep = None
        if self.options.keep_target:
            likeliest = teacher.argmax(1)
            keep = torch.stack([likeliest, labels], 1) if self.gold else likeliest
        return dac_kl(student, teacher, lower, upper, keep, tau=self.options.tau)


class SpanCorrelation(Loss):
    """Products of the next-token distributions of neighbours inside a phrase; mean over the pairs, 0 without any.

    The phrases are found in the text of the batch's labels, with the data's tokenizer.
    """

    def __init__(self, options: SpanOptions | None = None) -> None:
        super().__init__()
        self.options = options or SpanOptions()
        self.spans: Spans | None = None

    def setup(self, data: DataModule, split: str) -> None:
        """Take the data's tokenizer. Raises `DataError` where it has none, or the chunker is not there."""
        if data.task.tokenizer is None:
            raise DataError("span-correlation finds phrases in text, and the data has no tokenizer to decode its "
                            "tokens: give it one, or leave the term out (method mgsr-llm: `span: false`)")  # fmt: skip
        self.spans = Spans(data.task.tokenizer, self.options.chunker)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean. Only one chunk of pairs at a time holds more than its logits; it is computed again for its
        gradient."""
        pairs = self.pairs(batch)
        ours, theirs = Scores.of(student), Scores.of(teacher)
        step = max(1, CHUNK.get(pairs.device.type, CHUNK["cuda"]) // (2 * ours.size))

        def distances(first: Tensor) -> Tensor:
            where = torch.stack([first, first + 1], 1)
            values = span_correlation(ours.at(where), theirs.at(where).detach(), metric=self.options.metric)
            return values.sum()

        total = ours.inputs[:0].float().sum()  # 0, with a gradient
        for first in torch.split(pairs, step) if len(pairs) else ():
            part: Tensor = checkpoint(distances, first, use_reentrant=False, preserve_rng_state=False)
            total = total + part
        return total / max(len(pairs), 1)

    def count(self, batch: Batch) -> Tensor:
        """Pairs of neighbours inside a span."""
        pairs = self.pairs(batch)
        return pairs.new_tensor(len(pairs))

    def pairs(self, batch: Batch) -> Tensor:
        """The first of each two neighbours in a span, `[N]`, as positions in the flat batch."""
        if self.spans is None:
            raise DataError("span-correlation was not set up with data: call `setup(data, split)` first")
        labels = need_labels(batch)
        return span_pairs(labels, [self.spans(row) for row in labels.tolist()])
