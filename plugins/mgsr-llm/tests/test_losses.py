import pytest
import torch
from torch import Tensor, nn

from kd_demo.grammar import TOKENIZER
from kd_llm_kd_suite import chunked
from kd_mgsr_llm import losses
from kd_mgsr_llm.losses import DACKL, SpanCorrelation
from kd_mgsr_llm.options import DACOptions, SpanOptions
from kdcore import Outputs
from kdcore.data import IGNORE, DataModule, Task
from kdcore.errors import DataError

SIZE = len(TOKENIZER)
TEXTS = ("the old dentist drilled the molar .", "in the market a ferry docked the small anchor . again")


def rows(*texts: str, padding: int = 0) -> dict[str, Tensor]:
    """A batch of texts whose first token is the prompt."""
    ids = [[*TOKENIZER.encode(text), TOKENIZER.end_id] for text in texts]
    longest = max(map(len, ids)) + padding
    labels = [[*row[1:], *[IGNORE] * (longest - len(row) + 1)] for row in ids]
    return {"input_ids": torch.zeros(len(ids), longest, dtype=torch.long), "labels": torch.tensor(labels),
            "index": torch.arange(len(ids))}  # fmt: skip


def outputs(batch: dict[str, Tensor], seed: int, width: int = 8) -> Outputs:
    """Hidden states and the layer after them, the same at the same position whatever the padding."""
    torch.manual_seed(seed)
    head, hidden = nn.Linear(width, SIZE), torch.randn(4, 40, width)
    shape = batch["labels"].shape
    return Outputs(embedding=hidden[: shape[0], : shape[1]].clone().requires_grad_(), head=head)


def dac(**options: object) -> DACKL:
    torch.manual_seed(0)
    return DACKL(DACOptions(**options))


def spans(**options: object) -> SpanCorrelation:
    loss = SpanCorrelation(SpanOptions(**options))
    task = Task("causal-lm", num_classes=SIZE, tokenizer=TOKENIZER)
    loss.setup(DataModule({"train": [0]}, task), "train")
    return loss


@pytest.mark.parametrize("make", [dac, spans])
def test_value_does_not_depend_on_padding(make):
    loss = make()
    values = []
    for padding in (0, 7):
        batch = rows(*TEXTS, padding=padding)
        values.append(loss(outputs(batch, 1), outputs(batch, 2), batch))
    torch.testing.assert_close(*values)
    assert values[0] > 0


@pytest.mark.parametrize("make", [dac, spans])
def test_a_few_positions_at_a_time_give_the_value_and_gradients_of_all_at_once(make, monkeypatch):
    batch, loss, found = rows(*TEXTS), make(), []
    for few in (False, True):
        if few:
            monkeypatch.setattr(chunked, "PLAIN", 0)
            monkeypatch.setitem(chunked.CHUNK, "cpu", 4 * SIZE)
        student, teacher = outputs(batch, 1), outputs(batch, 2)
        value = loss(student, teacher, batch)
        if make is dac:
            nn.init.normal_(loss.levels.layers[2].weight, generator=torch.Generator().manual_seed(0))
            value = loss(student, teacher, batch)
        inputs = [student.embedding, student.head.weight, student.head.bias, *loss.parameters()]
        found.append([value, *torch.autograd.grad(value, inputs)])
    assert losses.CHUNK is chunked.CHUNK
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in found[1][1:])


def test_clipped_kl_keeps_the_texts_own_token_on_data_only():
    batch = rows(TEXTS[0])
    logits = torch.zeros(1, batch["labels"].shape[1], SIZE)
    logits[..., 50:] = 3.0  # what the texts hold is less probable than the lower level
    logits[..., 60] = 9.0
    batch["labels"] = batch["labels"].clamp(max=5)
    loss, student = dac(), Outputs(logits=torch.randn(logits.shape))
    on_data = loss(student, Outputs(logits=logits), batch)
    loss.gold = False
    on_samples = loss(student, Outputs(logits=logits), batch)
    assert on_data != on_samples
    never = dac(keep_target=False)
    assert never(student, Outputs(logits=logits), batch) != on_samples  # the likeliest one lies above the upper level


def test_span_term_is_the_mean_over_the_pairs_inside_phrases():
    batch, loss = rows(TEXTS[0]), spans()
    student, teacher = outputs(batch, 1), outputs(batch, 2)
    q, p = (side.need("logits")[0].softmax(1) for side in (student, teacher))
    # the answer "old dentist drilled the molar" is a phrase of five tokens
    wanted = torch.stack([(p[i] * p[i + 1] - q[i] * q[i + 1]).norm() for i in range(4)]).mean()
    torch.testing.assert_close(loss(student, teacher, batch), wanted)
    assert loss.count(batch) == 4


def test_span_term_is_0_with_a_gradient_where_no_phrase_has_two_tokens():
    batch, loss = rows("the ."), spans()
    student = outputs(batch, 1)
    value = loss(student, outputs(batch, 2), batch)
    value.backward()
    assert value == loss.count(batch) == 0
    assert (student.embedding.grad == 0).all()


def test_texts_of_a_packed_row_are_apart():
    one, two = rows(TEXTS[0]), rows(TEXTS[1])
    whole = {"labels": torch.cat([one["labels"], two["labels"]], 1)}
    loss = spans()
    first = one["labels"].shape[1]
    assert loss.pairs(whole).tolist() == [*loss.pairs(one).tolist(), *(first + loss.pairs(two)).tolist()]


def test_data_without_a_tokenizer_is_refused():
    with pytest.raises(DataError, match="tokenizer"):
        SpanCorrelation().setup(DataModule({"train": [0]}, Task("causal-lm", num_classes=9)), "train")
