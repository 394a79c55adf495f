"""Which layers are compared, how their activations become maps, and which pairs of models each loss takes."""

import pytest
import torch
from torch import nn

from kd_classic import losses
from kd_classic.functional import ofd_margin
from kd_classic.layers import as_map, choose
from kd_classic.options import OFDOptions
from kd_demo.models import cnn, transformer
from kd_demo.models import vit as make_vit
from kd_demo.options import CNNOptions, DigitsOptions, TopicsOptions, TransformerOptions, ViTOptions
from kdcore import Distill, Model, PluginManager
from kdcore.errors import ModelError
from kdcore.losses import Weighted
from kdcore.models import FromColumns, Outputs

ON_LAYERS = ("fitnets", "at", "nst", "vid", "ab", "ofd", "reviewkd", "mgd", "simkd", "sp", "skd-pairwise")
ON_VECTORS = ("rkd", "pkt")


def stack(*widths):
    """A model whose stages are linear layers of these widths."""
    net = nn.ModuleDict({f"stage{i}": nn.Linear(width, width) for i, width in enumerate(widths)})
    return Model(net, stages=[f"stage{i}" for i in range(len(widths))])


CNN_LIKE, BLOCKS_12, BLOCKS_6 = stack(1, 2, 3, 4, 5), stack(*[4] * 12), stack(*[3] * 6)


@pytest.mark.parametrize(
    ("student", "teacher", "which", "ours", "theirs"),
    [
        (CNN_LIKE, CNN_LIKE, "all", [1, 2, 3, 4], [1, 2, 3, 4]),  # the stem is left out
        (CNN_LIKE, BLOCKS_12, "all", [1, 2, 3, 4], [2, 5, 8, 11]),
        (BLOCKS_6, BLOCKS_12, "all", [0, 1, 2, 3, 4, 5], [1, 3, 5, 7, 9, 11]),
        (stack(1, 2, 3), CNN_LIKE, "middle", [1], [3]),
        (BLOCKS_12, CNN_LIKE, "last", [11], [4]),
    ],
)
def test_layers_are_chosen_from_the_deep_end_of_a_cnn_and_evenly_from_equal_blocks(
    student, teacher, which, ours, theirs
):
    assert choose(student, teacher, which) == ([f"stage{i}" for i in ours], [f"stage{i}" for i in theirs])


def test_models_without_stages_and_columns_are_told_what_to_do():
    with pytest.raises(ModelError, match=r"the teacher \(Linear\) names no stages .* give module names"):
        choose(CNN_LIKE, Model(nn.Linear(2, 2)), "all")
    with pytest.raises(ModelError, match="need a live teacher"):
        choose(CNN_LIKE, FromColumns({"logits": "teacher_logits"}), "all")


def test_patches_become_a_grid_without_class_token_and_tokens_a_row_without_padding():
    tokens = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    grid = as_map(tokens)
    assert grid.shape == (2, 3, 3, 3)
    torch.testing.assert_close(grid[0, :, 0, 1], tokens[0, 2])
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 4:] = 0
    row = as_map(tokens, mask)
    assert row.shape == (2, 3, 1, 10)
    assert not row[1, :, :, 4:].any()
    single = as_map(tokens, mask, by_position=True)
    torch.testing.assert_close(single[:, :, 0, 0], tokens[mask.bool()])
    assert as_map(tokens[:, 0]).shape == (2, 3, 1, 1)


@pytest.mark.parametrize("shape", [(2, 8, 3), (2, 3, 4, 4, 4), (5,)])
def test_activations_that_make_no_map_are_refused(shape):
    with pytest.raises(ValueError, match=r"no square|neither a map"):
        as_map(torch.zeros(shape))


DATA = {}


def data(kind):
    if kind not in DATA:
        options = {"digits": DigitsOptions, "topics": TopicsOptions}[kind]()
        DATA[kind] = PluginManager().get("data", kind).load_target()(options)
    return DATA[kind]


def build(family, wide=False):
    """Data and a small model of a family."""
    torch.manual_seed(int(wide))
    if family == "text":
        found = data("topics")
        return found, transformer(TransformerOptions(width=16, layers=4 if wide else 2), found.task)
    found = data("digits")
    if family == "cnn":
        return found, cnn(CNNOptions(width=8 if wide else 4), found.task)
    return found, make_vit(ViTOptions(width=16, layers=6 if wide else 3, heads=2), found.task)


def stage(name, student, teacher):
    found, ours = build(student)
    _, theirs = build(teacher, wide=True)
    loss = PluginManager().get("loss", name)
    made = Distill(ours, [Weighted(loss.load_target()(loss.load_options()()), name="it")], theirs)
    made.setup(found)
    batch = found.sample("train", 6)
    made.eval()
    with torch.no_grad():
        made.prepare(batch)
    return made.train(), batch


FAMILIES = [("cnn", "cnn"), ("cnn", "vit"), ("vit", "cnn"), ("vit", "vit"), ("text", "text")]
WHY_NOT = {
    "ofd": ({"vit", "text"}, "margins from the batch norm"),
    "mgd": (set(), "position by position"),
    "skd-pairwise": ({"text"}, "less than a pixel"),
}


@pytest.mark.parametrize(("student", "teacher"), FAMILIES)
@pytest.mark.parametrize("name", [*ON_LAYERS, *ON_VECTORS])
def test_every_loss_trains_the_student_in_every_pair_of_families_or_says_why_not(name, student, teacher):
    families, reason = WHY_NOT.get(name, (set(), ""))
    if teacher in families or (name == "mgd" and {student, teacher} == {"cnn", "vit"}):
        with pytest.raises((ModelError, ValueError), match=reason):
            stage(name, student, teacher)
        return
    made, batch = stage(name, student, teacher)
    (value,) = made(batch).values()
    value.backward()
    gradients = [p.grad for p in made.student.parameters() if p.grad is not None]
    assert value.isfinite()
    assert any(g.abs().sum() > 0 for g in gradients)
    assert all(g.isfinite().all() for g in gradients)
    assert all(p.grad is None for p in made.teachers["teacher"].parameters())


def test_several_layers_may_be_named_at_once_and_must_be_as_many():
    found, student = build("cnn")
    _, teacher = build("cnn", wide=True)
    options = PluginManager().get("loss", "at").load_options()
    loss = losses.AT(options(student_layers=["stage?"], teacher_layers=["@all"]))
    Distill(student, [Weighted(loss)], teacher)
    assert loss.names == {"student": ["stage1", "stage2", "stage3"], "teacher": ["stage1", "stage2", "stage3"]}
    with pytest.raises(ValueError, match="give both, or neither"):
        options(student_layers=["@0"])


def test_embeddings_come_from_the_model_or_else_from_the_input_of_its_classifier():
    plain = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)))
    loss = losses.RKD()
    made = Distill(plain, [Weighted(loss, name="rkd")], FromColumns({"embedding": "theirs"}))
    batch = {"image": torch.randn(4, 1, 8, 8), "theirs": torch.randn(4, 9), "index": torch.arange(4)}
    made.prepare(batch)
    assert loss.names == {"student": ["3:input"], "teacher": []}
    torch.testing.assert_close(loss.vectors("student", plain(batch), batch), plain(batch).features["3:input"])
    torch.testing.assert_close(loss.vectors("teacher", Outputs(embedding=batch["theirs"]), batch), batch["theirs"])


def test_the_overhaul_takes_named_norms_and_the_batchs_statistics():
    found, student = build("cnn")
    _, teacher = build("cnn", wide=True)
    layers = {"student_layers": ["@-1:pre"], "teacher_layers": ["@-1:pre"]}
    loss = losses.OFD(OFDOptions(**layers, teacher_norms=["stage3.0.bn1"], teacher_batch_statistics=True))
    norm = teacher.module.get_submodule("stage3.0.bn1")
    nn.init.normal_(norm.bias)
    Distill(student, [Weighted(loss)], teacher)
    torch.testing.assert_close(loss.margins.margin0, ofd_margin(norm.weight, norm.bias))
    first, second = (teacher({"image": found.sample("train", size)["image"]}).logits[:4] for size in (4, 8))
    assert not torch.allclose(first, second)  # what a sample gives depends on the batch it is in
    with pytest.raises(ModelError, match="names 1 batch norms for 3 layers"):
        Distill(student, [Weighted(losses.OFD(OFDOptions(teacher_norms=["stage3.0.bn1"])))], teacher)


def test_modules_made_for_the_first_batch_learn_nothing_from_it():
    made, _ = stage("fitnets", "cnn", "cnn")
    adapter = made.losses["it"].adapters[0]
    assert not adapter.bn.running_mean.any()
    assert adapter.training
