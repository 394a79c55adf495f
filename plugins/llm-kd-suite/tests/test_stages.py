"""What each part of an algorithm is there for, seen apart: with models of a few weights, and a language of four tokens
to come after each."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kd_llm_kd_suite import functional
from kd_llm_kd_suite.losses import AttentionMaps, Divergence, HiddenStates, NextToken
from kd_llm_kd_suite.minillm import MiniLLM
from kd_llm_kd_suite.options import AttentionOptions, HiddenOptions, SuiteOptions
from kd_llm_kd_suite.preferences import Policy
from kd_llm_kd_suite.stages import SequenceDistill
from kd_llm_kd_suite.texts import Schedule
from kd_transformers.writing import Writer
from kdcore.data import IGNORE
from kdcore.generation import join_rows, row_seeds, split_rows
from kdcore.losses import Progress, Weighted
from kdcore.models import Model, Outputs

V = 24


def model(seed: int) -> Model:
    """A small Llama that writes."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.4, bos_token_id=None,
                         eos_token_id=0)  # fmt: skip
    module = LlamaForCausalLM(config).eval()

    def call(module, batch):
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        found = module(**given, output_hidden_states=True)
        return Outputs(logits=found.logits, embedding=found.hidden_states[-1])

    return Model(module, call, writer=Writer(module, None))


def texts(rows: int = 16):
    """Prompts of three tokens, with an answer."""
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(1, V, (rows, 3), generator=generator).tolist()
    return {**join_rows(prompts, [[5, 6, 0]] * rows), "index": torch.arange(rows)}


def options(**values):
    return SuiteOptions(max_new_tokens=5, **values)


def test_minillm_keeps_with_each_token_what_both_models_say_of_it():
    student, teacher, batch = model(0), model(1), texts()
    stage = MiniLLM(student, teacher, options(algorithm="minillm", mix_alpha=0.3, length_norm=False), 0)
    stage.before_step([batch])
    rows = batch["rollout"]
    mask = rows["labels"] != IGNORE
    with torch.no_grad():
        ours, theirs = (functional.token_logprobs(m(rows).logits, rows["labels"]) for m in (student, teacher))
    mixture = (0.7 * ours.exp() + 0.3 * theirs.exp()).log()
    torch.testing.assert_close(rows["old"][mask], ours[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows["drawn"][mask], mixture[mask], rtol=1e-4, atol=1e-5)
    assert rows["advantage"][mask].mean().abs() < 1e-5
    last = torch.zeros_like(mask)  # after the last token there is no return to come but its own reward
    last[torch.arange(len(mask)), mask.long().cumsum(1).argmax(1)] = True
    own = (theirs - ours)[last]
    assert torch.corrcoef(torch.stack([own, rows["advantage"][last]]))[0, 1] > 0.999


def test_the_policy_term_of_minillm_alone_lowers_the_reverse_kl_of_the_students_texts():
    student, teacher = model(0), model(1)
    stage = MiniLLM(student, teacher, options(algorithm="minillm", inner_epochs=1), 0)
    adam = torch.optim.Adam(stage.parameters(), 1e-2)
    found = []
    for step in range(100):
        batch, stage.progress = texts(64), Progress(step=step)
        stage.before_step([batch])
        rows = batch["rollout"]
        with torch.no_grad():
            ours, theirs = (functional.token_logprobs(m(rows).logits, rows["labels"]) for m in (student, teacher))
        found.append(float((ours - theirs)[rows["labels"] != IGNORE].mean()))  # an estimate of the reverse KL
        adam.zero_grad()
        stage.train()(batch)["policy"].backward()
        adam.step()
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


class Likes(nn.Module):
    """A reward: the share of a token among a row's labels."""

    def rewards(self, rows):
        counts = rows["labels"] != IGNORE
        return ((rows["labels"] == 9) & counts).sum(1) / counts.sum(1)


def test_a_policy_learns_to_write_what_is_rewarded():
    student = model(0)
    stage = Policy(student, Likes(), options(algorithm="rm_rl", kl_beta=0.0), 0)
    adam = torch.optim.Adam(stage.parameters(), 3e-3)
    found = []
    for step in range(60):
        batch, stage.progress = texts(32), Progress(step=step)
        stage.before_step([batch])
        found.append(float(batch["reward"].mean()))
        adam.zero_grad()
        stage.train()(batch)["policy"].backward()
        adam.step()
    assert sum(found[-10:]) / 10 > sum(found[:10]) / 10 + 0.2


def test_with_a_fraction_of_1_a_batch_holds_what_the_student_writes_and_nothing_else():
    student, teacher, batch = model(0), model(1), texts()
    losses = [Weighted(Divergence("jsd", beta=0.5), 1.0, "jsd")]
    o = options()
    stage = SequenceDistill(student, losses, teacher, sampling=o.sampling, schedule=Schedule(1.0), capacity=4, seed=3)
    prompts, _ = split_rows(batch)
    wanted = student.write(prompts, o.sampling, row_seeds(batch, 3, "distill", 0))
    stage.before_step([batch])
    assert split_rows(batch) == (prompts, wanted)


@pytest.mark.parametrize("kind", ["l2", "l1", "ce", "mmd"])
def test_hidden_states_meet_those_of_evenly_spread_layers_of_the_teacher(kind):
    torch.manual_seed(0)
    loss = HiddenStates(HiddenOptions(student=["a", "b"], teacher=["a", "b", "c", "d"], kind=kind))
    loss.names = {"student": ["a", "b"], "teacher": ["a", "b", "c", "d"]}
    ours = {name: torch.randn(2, 5, 8) for name in "ab"}
    same = {"a": torch.randn(2, 5, 8), "b": ours["a"], "c": torch.randn(2, 5, 8), "d": ours["b"]}
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5)}

    def value(**changed):
        return float(loss(Outputs(features=ours), Outputs(features={**same, **changed}), batch))

    value()  # makes the projectors
    for projector in loss.projectors:
        nn.init.eye_(projector.weight)
    equal = value()
    if kind != "ce":  # a cross-entropy keeps the entropy
        assert abs(equal) < 1e-5
    assert value(a=ours["a"] * 5, c=ours["b"] * 5) == equal
    for name in "bd":
        assert value(**{name: torch.randn(2, 5, 8)}) > equal + 0.01


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_attention_maps_are_compared_where_there_are_tokens(kind):
    torch.manual_seed(0)
    loss = AttentionMaps(AttentionOptions(kind=kind))
    maps = [torch.randn(2, 3, 5, 5).tril().masked_fill(torch.ones(5, 5).triu(1) > 0, -1e9).softmax(-1)
            for _ in range(4)]  # fmt: skip
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": mask}

    def value(ours, theirs):
        return loss(Outputs(extras={"attentions": ours}), Outputs(extras={"attentions": theirs}), batch)

    assert value([maps[1], maps[3]], maps).abs() < 1e-6
    assert value([maps[0], maps[2]], maps) > 1e-4
    changed = [m.clone() for m in maps]
    changed[1][1, :, 3:] = 0.2
    torch.testing.assert_close(value([maps[0], maps[2]], changed), value([maps[0], maps[2]], maps))


def test_every_divergence_brings_a_student_nearer_to_the_teacher_than_the_texts_do():
    generator = torch.Generator().manual_seed(0)
    chain = torch.randn(V, V, generator=generator) * 2  # what the teacher knows of the language

    def batch():
        ids = torch.randint(V, (8, 1), generator=generator)
        for _ in range(12):
            ids = torch.cat([ids, torch.multinomial(chain.softmax(1)[ids[:, -1]], 1, generator=generator)], 1)
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    held_out = batch()
    data = [batch() for _ in range(12)]

    def trained(loss) -> float:
        torch.manual_seed(1)
        student = nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, V))
        adam = torch.optim.Adam(student.parameters(), 0.02)

        def apart(found):
            ids = found["input_ids"]
            return Outputs(logits=student(ids)), Outputs(logits=chain[ids]), found

        with torch.no_grad():
            before = float(Divergence("fkl")(*apart(held_out)))
        for step in range(150):
            adam.zero_grad()
            loss(*apart(data[step % len(data)])).backward()
            adam.step()
        with torch.no_grad():
            return float(Divergence("fkl")(*apart(held_out))) / before

    alone = trained(NextToken())
    for name, settings in (("fkl", {}), ("rkl", {}), ("jsd", {"beta": 0.5}), ("sfkl", {"alpha": 0.1}),
                           ("srkl", {"alpha": 0.1})):  # fmt: skip
        left = trained(Divergence(name, **settings))
        assert left < 0.5, name
        assert left < alone, name
