from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_mgsr_llm.revision import correct_and_regenerate, end_tokens, worst_tokens
from kdcore import Model, Outputs
from kdcore.options import Sampling

SIZE, END = 50, 3
GREEDY, SAMPLED = Sampling(max_tokens=12, temperature=0), Sampling(max_tokens=12)


class Bigram(nn.Module):
    """Logits of the next token by the last one."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.generation_config = SimpleNamespace(eos_token_id=END)
        self.dropout = nn.Dropout(0.9)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.dropout(self.table[input_ids])


def write(module: Any, contexts: Any, sampling: Sampling, seeds: Any, limits: Any, mix: Any) -> list[list[int]]:
    """Draws with a generator per row."""
    found = []
    for context, seed, limit in zip(contexts, seeds, limits or [sampling.max_tokens] * len(seeds), strict=True):
        assert limit > 0
        generator, row = torch.Generator().manual_seed(seed), []
        while len(row) < limit and row[-1:] != [END]:
            logits = module.table[(*context, *row)[-1]]
            drawn = (
                torch.multinomial(logits.softmax(0), 1, generator=generator)
                if sampling.temperature
                else logits.argmax()
            )
            row.append(int(drawn))
        found.append(row)
    return found


def bigram(table: Tensor) -> Model:
    return Model(Bigram(table), lambda module, batch: Outputs(logits=module(batch["input_ids"])), writer=write)


def follows(**pairs: int) -> Tensor:
    """A table in which a token is followed by another, nearly always: `follows(_4=5)`."""
    table = torch.zeros(SIZE, SIZE)
    for one, two in pairs.items():
        table[int(one[1:]), two] = 8.0
    return table


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    """A sharp teacher and a student that is a blurred and noisy copy."""
    torch.manual_seed(0)
    table = 3 * torch.randn(SIZE, SIZE)
    return bigram(table), bigram(0.4 * table + torch.randn(SIZE, SIZE))


def revise(teacher: Model, student: Model, answers: list[list[int]], prompt: int = 4, sampling: Sampling = SAMPLED,
           **options: Any) -> list[list[int]]:  # fmt: skip
    prompts = [[1] * (i % 3) + [prompt] for i in range(len(answers))]  # of different lengths
    return correct_and_regenerate(prompts, answers, list(range(len(answers))), teacher=teacher, student=student,
                                  sampling=sampling, **options)  # fmt: skip


def logprob(model: Model, answers: list[list[int]], prompt: int = 4) -> float:
    table = model.module.table.log_softmax(1)
    found = [table[a, b].item() for row in answers for a, b in zip([prompt, *row], row, strict=False)]
    return sum(found) / len(found)


def test_worst_token_becomes_the_teachers_and_what_is_before_it_stays(models):
    teacher, student = models
    answers = student.write([[4]] * 64, SAMPLED, list(range(64)))
    prompts = [[4]] * 64
    places = worst_tokens(prompts, answers, teacher.eval(), student.eval())
    revised = correct_and_regenerate(prompts, answers, list(range(64)), teacher=teacher, student=student,
                                     sampling=SAMPLED)  # fmt: skip
    tables = [model.module.table.log_softmax(1) for model in models]
    for old, new, found in zip(answers, revised, places, strict=True):
        place, token = found
        before = torch.tensor([4, *old[:-1]])
        p, q = (table[before] for table in tables)
        wrong = p.argmax(1) != torch.tensor(old)
        worst = (p.exp() * (p - q)).sum(1).masked_fill(~wrong, -1).argmax().item()
        assert place == worst
        assert new[:place] == old[:place]
        assert new[place] == token == p.argmax(1)[place] != old[place]
        assert len(new) <= SAMPLED.max_tokens
        assert END not in new[:-1]
    assert len({place for place, _ in places}) > 3
    assert logprob(teacher, revised) > logprob(teacher, answers) + 0.1


def test_greedy_texts_of_a_student_that_is_the_teacher_are_left_alone(models):
    teacher = models[0]
    answers = teacher.write([[4]] * 3, GREEDY, [0, 1, 2])
    assert revise(teacher, teacher, answers, sampling=GREEDY, rounds=3) == answers


def test_student_goes_on_from_another_place_in_each_row():
    teacher, student = bigram(follows(_4=5, _5=6, _6=7, _7=8)), bigram(follows(_4=9, _9=9, _5=9, _6=9, _7=9, _8=9))
    answers = [[9, 9], [5, 9, 9], [5, 6, 9]]
    # what follows 9 is the same to the teacher, flat, as anything: its likeliest token there is the first, 0
    found = revise(teacher, student, answers, sampling=Sampling(max_tokens=5, temperature=0))
    assert [row[:3] for row in found] == [[5, 9, 9], [5, 6, 9], [5, 6, 7]]
    assert {len(row) for row in found} == {5}


def test_nothing_follows_an_end_that_the_teacher_puts():
    teacher, student = bigram(follows(_4=5, _5=END)), bigram(follows(_4=5, _5=9, _9=9))
    assert revise(teacher, student, [[5, 9, 9, 9]]) == [[5, END]]


def test_an_end_that_came_too_early_is_replaced_and_nothing_after_an_end_is_looked_at():
    teacher, student = bigram(follows(_4=5, _5=6, _6=END)), bigram(follows(_4=5, _5=END, _6=END))
    assert revise(teacher, student, [[5, END]], sampling=GREEDY) == [[5, 6, END]]
    agreeing = bigram(follows(_4=5, _5=END))
    assert revise(agreeing, student, [[5, END]]) == [[5, END]]


def test_last_token_of_a_text_that_is_full_is_replaced_alone():
    teacher, student = bigram(follows(_4=5, _5=6)), bigram(follows(_4=5, _5=9))
    assert revise(teacher, student, [[5, 9]], sampling=Sampling(max_tokens=2)) == [[5, 6]]


def test_texts_stay_within_what_the_student_can_read():
    teacher, student = bigram(follows(_4=5, _5=6, _6=7)), bigram(follows(_4=5, _5=9, _9=9, _6=9))
    student.module.config = SimpleNamespace(max_position_embeddings=4)
    assert revise(teacher, student, [[5, 9, 9]], sampling=GREEDY) == [[5, 6, 9]]


def test_each_round_corrects_another_place_and_draws_with_other_numbers(models):
    teacher, student = models
    answers, seeds = student.write([[4]] * 32, SAMPLED, list(range(32))), []
    prompts = [[4]] * 32

    class Sampler:
        def write(self, contexts: Any, sampling: Sampling, numbers: Any, *, limits: Any = None) -> Any:
            seeds.append(set(numbers))
            return student.write(contexts, sampling, numbers, limits=limits)

    one, three = (correct_and_regenerate(prompts, answers, list(range(32)), teacher=teacher, student=student,
                                         sampling=SAMPLED, rounds=n, sampler=Sampler()) for n in (1, 3))  # fmt: skip
    assert logprob(teacher, three) > logprob(teacher, one) + 0.1
    assert len(seeds) == 4
    assert seeds[0] & seeds[1]
    assert not seeds[1] & seeds[2]
    assert not seeds[2] & seeds[3]


def test_models_are_asked_in_evaluation_mode_and_left_as_they_were(models):
    teacher, student = models
    student.train()
    answers = student.write([[4]] * 4, SAMPLED, [0, 1, 2, 3])
    first, second = (revise(teacher, student, answers) for _ in range(2))
    assert first == second
    assert student.training
    assert student.module.table.grad is None


def test_tokens_that_end_a_text_are_those_of_the_settings_or_of_the_tokenizer(models):
    student = models[1]
    assert end_tokens(student) == {END}
    plain = Model(nn.Linear(2, 2), tokenizer=SimpleNamespace(eos_token_id=7))
    assert end_tokens(plain) == {7}
    plain.module.generation_config = SimpleNamespace(eos_token_id=[5, 6])
    assert end_tokens(plain) == {5, 6}
    assert end_tokens(Model(nn.Linear(2, 2))) == frozenset()
