"""Probes: nearest neighbours and a linear classifier on an embedding."""

from __future__ import annotations

import pytest
import torch

import kdcore
from kdcore import Component, Method, Model, Outputs
from kdcore.errors import DataError, ModelError
from kdcore.probes import embeddings, knn, linear, probe


def clusters(n=60, classes=3, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return torch.eye(classes, 5)[labels] * 3 + spread * torch.randn(n, 5, generator=generator), labels


@pytest.mark.parametrize("scores", [knn, linear], ids=["knn", "linear"])
def test_separate_clusters_are_told_apart_and_noise_is_not(scores):
    (known, labels), (asked, truth) = clusters(), clusters(seed=1)
    assert (scores(known, labels, asked).argmax(1) == truth).float().mean() == 1
    noise = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    assert (scores(noise[:30], labels[:30], noise[30:]).argmax(1) == truth[30:]).float().mean() < 0.7


def test_votes_are_those_of_a_loop_over_the_neighbours():
    (known, labels), (asked, _) = clusters(20), clusters(4, seed=3)
    found = knn(known, labels, asked, k=5, temperature=0.5)
    for row, query in zip(found, asked, strict=True):
        cosines = torch.stack([torch.cosine_similarity(query, reference, 0) for reference in known])
        wanted = torch.zeros(3)
        for index in cosines.argsort(descending=True)[:5]:
            wanted[labels[index]] += (cosines[index] / 0.5).exp()
        torch.testing.assert_close(row, wanted)


def test_more_neighbours_than_there_are_is_all_of_them():
    known, labels = clusters(6)
    torch.testing.assert_close(knn(known, labels, known, k=100), knn(known, labels, known, k=6))


class Probes(Method):
    embedding = True

    def stages(self, run):
        give = (lambda m, b: Outputs(embedding=b["series"][:, :4])) if self.embedding else None
        model = Model(run.student.module, call=give)
        found, labels = embeddings(run, model, "val")
        assert torch.equal(labels, torch.stack([run.data["val"][i][1] for i in range(32)]))
        for name, value in probe(run, model, "train", "val").items():
            run.add_metric(name, value)
        yield from ()


class Without(Probes):
    embedding = False


class Plugin:
    @kdcore.hookimpl
    def kd_register_methods(self):
        return [Component("method", "probes", Probes), Component("method", "without", Without)]


def test_a_run_reports_its_probes(manager, recipe, tmp_path):
    manager.register(Plugin(), name="probes")
    result = kdcore.run({**recipe, "method": "probes"}, run_dir=tmp_path / "run", plugins=manager)
    assert {"val/knn-accuracy", "val/knn-f1", "val/linear-balanced-accuracy"} <= set(result.metrics)
    assert result.metrics["val/linear-accuracy"] > 0.6


def test_a_model_without_an_embedding_is_told(manager, recipe, tmp_path):
    manager.register(Plugin(), name="probes")
    with pytest.raises(ModelError, match="no embedding"):
        kdcore.run({**recipe, "method": "without"}, run_dir=tmp_path / "run", plugins=manager)


def test_samples_without_labels_are_told(manager, recipe, tmp_path):
    class Blind(Method):
        def stages(self, run):
            data = kdcore.DataModule({"val": [{"series": torch.zeros(6)}] * 3}, run.data.task)
            embeddings(run, run.student, "val", data)
            yield

    class More:
        @kdcore.hookimpl
        def kd_register_methods(self):
            return [Component("method", "blind", Blind)]

    manager.register(More(), name="more")
    with pytest.raises(DataError, match="no label"):
        kdcore.run({**recipe, "method": "blind"}, run_dir=tmp_path / "run", plugins=manager)
