import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd_llm_kd_suite.texts import Buffer
from kd_mgsr_llm import stages
from kd_mgsr_llm.losses import DACKL
from kd_mgsr_llm.options import MGSROptions
from kd_mgsr_llm.stages import Mixed
from kdcore import PluginManager, api, hookimpl
from kdcore.errors import UserError
from kdcore.reading import load
from kdcore.recipe import find_recipe
from kdcore.testing.conformance import assert_same_students

SMALL = ["data.train=96", "data.val=24", "teacher.train.epochs=1", "train.steps=6",
         "train.batch_size=16", "method.answers=4", "method.max_new_tokens=8", "train.log_every=1"]  # fmt: skip
PLAIN = ["method.scrg=false", "method.dac=false", "method.span=false"]
ALONE = [*PLAIN, "method.student_data_fraction=0", "method.dac_weight=0"]


def run(where, *overrides: str, method: Any = "mgsr-llm", plugins: PluginManager | None = None):
    return api.run(method, [*SMALL, *overrides], run_dir=where, plugins=plugins)


def quickstart() -> dict[str, Any]:
    return load(str(find_recipe("mgsr-llm", PluginManager())[0]))


def terms(result) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    return [row["terms"] for row in rows if row["stage"] == "distill" and "terms" in row]


class Watch:
    """Remembers facts of each step of the stage `distill`."""

    def __init__(self) -> None:
        self.stage: Any = None
        self.kinds: list[str] = []
        self.gold: list[bool] = []

    @hookimpl
    def kd_step_finished(self, stage: Any, step: int) -> None:
        if stage.name == "distill":
            self.stage = stage
            self.kinds.append(stage.kind)
            self.gold += [loss.gold for loss in stage.clipped]


def watched(where, *overrides: str) -> Watch:
    manager, watch = PluginManager(), Watch()
    manager.register(watch, name="watch")
    run(where, *overrides, plugins=manager)
    return watch


def test_own_texts_are_corrected_before_the_student_learns_from_them(tmp_path, monkeypatch):
    calls = []

    def spy(prompts, answers, seeds, **options):
        calls.append((len(answers), options["rounds"]))
        return [[5, 6, 3]] * len(answers)

    monkeypatch.setattr(stages, "correct_and_regenerate", spy)
    watch = watched(tmp_path / "run", "method.student_data_fraction=1", "method.policy=off", "method.scrg_rounds=3")
    assert calls
    assert set(calls) == {(16, 3)}
    assert all(row["answer"] == [5, 6, 3] for row in watch.stage.buffer.rows)


def test_terms_of_a_step_are_those_of_its_texts(tmp_path):
    watch = watched(tmp_path / "run", "method.sft_weight=2")
    assert set(watch.kinds) == {"data", "new"}
    assert watch.gold == [kind == "data" for kind in watch.kinds]
    result_terms = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [row["terms"] for row in result_terms if row["stage"] == "distill" and "terms" in row]
    assert [row["sft"] > 0 for row in found] == watch.gold
    assert all(row["dac-kl"] > 0 and row["span"] > 0 for row in found)


def test_clipping_network_learns_at_its_own_rate_and_is_not_part_of_the_student(tmp_path):
    watch = watched(tmp_path / "run", "method.dac_lr_mult=0.5", "train.schedule.name=constant")
    (loss,) = (term for term in watch.stage.modules() if isinstance(term, DACKL))
    groups = watch.stage.optimizers(api.plan("mgsr-llm").resolved.recipe.train)["loss"].param_groups
    assert groups[1]["lr"] == pytest.approx(0.5 * groups[0]["lr"])
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in loss.parameters()}
    assert loss.levels.layers[2].weight.abs().max() > 0  # they began as 0
    saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert not [key for key in saved if "levels" in key]


def test_without_its_ideas_it_is_the_forward_kl_of_the_suite(tmp_path):
    ours = run(tmp_path / "ours", *PLAIN, "method.policy=off", "method.answers=0")
    suite = {"use": "llm-kd-suite", "algorithm": "fkl", "lmbda": 0.5, "policy": "replay", "sft_weight": 1.0}
    theirs = run(tmp_path / "theirs", "method.answers=0", method={**quickstart(), "method": suite})
    assert_same_students(ours.path, theirs.path)


@pytest.mark.parametrize("part", PLAIN)
def test_each_idea_changes_the_student(part, tmp_path):
    whole, without = run(tmp_path / "whole"), run(tmp_path / "without", part)
    with pytest.raises(AssertionError):
        assert_same_students(whole.path, without.path)


def test_steps_of_the_policies(tmp_path):
    """On: always new texts. Off: from the buffer. Mixed: either."""
    buffer, half = Buffer(10), Mixed(1.0)
    buffer.rows = [{"prompt": [1], "answer": [2]}]
    drawn = [(half.choose(buffer, 0.9, seed), half.replay) for seed in range(400)]
    through = [kind for kind, replay in drawn if replay]
    assert 150 < len(through) < 250
    assert {kind for kind, replay in drawn if not replay} == {"new"}
    assert 0.7 < through.count("old") / len(through) < 1
    again = [(half.choose(buffer, 0.9, seed), half.replay) for seed in range(400)]
    assert again == drawn


def test_yaml_words_for_true_and_false_are_policies():
    assert [MGSROptions(policy=word).policy for word in (True, False, "on", "off", "mixed")] == [
        "on", "off", "on", "off", "mixed"]  # fmt: skip


def test_clipped_divergence_and_spans_are_terms_of_the_method_distill(tmp_path):
    losses = [{"use": "dac-kl", "topk": None}, {"use": "span-correlation", "metric": "cosine", "weight": 2.0}]
    found = api.run({**quickstart(), "method": {"use": "distill"}, "losses": losses},
                    [o for o in SMALL if not o.startswith("method.")], run_dir=tmp_path / "run")  # fmt: skip
    assert all({"dac-kl", "span-correlation"} <= set(row) for row in terms(found))


def test_data_that_is_no_language_models_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"causal-lm|language model"):
        api.run({**quickstart(), "data": {"use": "topics"}, "eval": {}}, run_dir=tmp_path / "run")


def test_student_is_closer_to_the_teacher_than_by_forward_kl_and_than_alone(tmp_path):
    """Measured over seven seeds: 0.34 against 0.37 and 0.63 nats per token."""
    found: dict[str, list[float]] = {"method": [], "plain": [], "alone": []}
    for seed in (0, 1):
        shared = [f"seed={seed}", "train.log_every=1000", "train.eval_every=1000", "train.save_every=1000"]
        for name, more in (("method", []), ("plain", PLAIN), ("alone", ALONE)):
            result = api.run("mgsr-llm", [*shared, *more], run_dir=tmp_path / f"{name}-{seed}")
            if name == "method":
                (teacher,) = result.path.glob("stages/*-teacher/artifact/teacher")
                shared += ["teacher.train=false", f"teacher.checkpoint={teacher}"]
            found[name].append(result.metrics["val/divergence"])
    mean = {name: torch.tensor(values).mean().item() for name, values in found.items()}
    assert mean["method"] < mean["plain"] - 0.01
    assert mean["method"] < mean["alone"] - 0.1
