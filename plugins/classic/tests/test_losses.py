import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_classic import functional
from kd_classic.losses import AT, DIST, DKD, KD, CrossEntropy, FitNets
from kd_classic.options import ATOptions, CrossEntropyOptions, DISTOptions, DKDOptions, FitNetsOptions, KDOptions
from kdcore import Distill, Model, Outputs
from kdcore.errors import DataError, ModelError
from kdcore.losses import Weighted

IGNORE = -100
OPTIONS = {
    "kd": KDOptions(temperature=2, standardize=True),
    "dkd": DKDOptions(alpha=0.5, beta=3, temperature=2),
    "dist": DISTOptions(beta=2, gamma=3, tau=2),
}
MAKE = {"kd": KD, "dkd": DKD, "dist": DIST}
every_logit_loss = pytest.mark.parametrize("name", MAKE)


def reference(name: str, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The pure function on rows, with the options written out."""
    options = OPTIONS[name].model_dump()
    given = (student, teacher, target) if name != "dist" else (student, teacher)
    return getattr(functional, name)(*given, **options)


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator) for shape in shapes]


def batch_of(size: int, **values: Tensor) -> dict[str, Tensor]:
    return {"image": torch.zeros(size, 1), **values, "index": torch.arange(size)}


def value(name: str, student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return MAKE[name](OPTIONS[name])(Outputs(student), Outputs(teacher), batch)


def dense() -> tuple[Tensor, Tensor, Tensor]:
    """Logits at stride 4 and 2 of a mask of 16 x 16 pixels, a quarter of which is ignored."""
    student, teacher = draw((2, 5, 4, 4), (2, 5, 8, 8))
    mask = torch.randint(5, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    mask[:, :8, :8] = IGNORE
    return student, teacher, mask


@every_logit_loss
def test_logits_of_classes_are_compared_sample_by_sample(name):
    student, teacher = draw((6, 5), (6, 5))
    label = torch.arange(6) % 5
    found = value(name, student, teacher, batch_of(6, label=label))
    torch.testing.assert_close(found, reference(name, student, teacher, label))


@every_logit_loss
def test_logits_of_tokens_are_compared_where_the_label_counts(name):
    student, teacher = draw((2, 6, 5), (2, 6, 5))
    labels = torch.arange(12).view(2, 6) % 5
    labels[0, 3:] = IGNORE
    valid = labels != IGNORE
    found = value(name, student, teacher, batch_of(2, labels=labels))
    torch.testing.assert_close(found, reference(name, student[valid], teacher[valid], labels[valid]))


@every_logit_loss
def test_logits_of_pixels_are_compared_at_the_students_stride_where_the_mask_counts(name):
    student, teacher, mask = dense()
    found = value(name, student, teacher, batch_of(2, mask=mask))
    resized = F.interpolate(teacher, (4, 4), mode="bilinear", align_corners=False)
    small = mask[:, ::4, ::4]
    valid = small != IGNORE
    assert 0 < valid.sum() < valid.numel()
    rows = [logits.movedim(1, -1)[valid] for logits in (student, resized)]
    torch.testing.assert_close(found, reference(name, *rows, small[valid]))


@every_logit_loss
def test_what_stands_at_ignored_positions_does_not_matter(name):
    student, teacher, mask = dense()
    batch = batch_of(2, mask=mask)
    changed = student.clone()
    changed[:, :, :2, :2] += draw((2, 5, 2, 2), seed=2)[0]
    assert value(name, changed, teacher, batch) == value(name, student, teacher, batch)


@every_logit_loss
def test_a_batch_in_which_nothing_counts_gives_zero_with_a_gradient(name):
    student, teacher, mask = dense()
    student.requires_grad_()
    found = value(name, student, teacher, batch_of(2, mask=torch.full_like(mask, IGNORE)))
    found.backward()
    assert found == 0
    assert not student.grad.any()


def test_cross_entropy_is_taken_at_the_masks_resolution():
    student, _, mask = dense()
    found = CrossEntropy(CrossEntropyOptions(label_smoothing=0.1))(Outputs(student), Outputs(), batch_of(2, mask=mask))
    large = F.interpolate(student, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, F.cross_entropy(large, mask, label_smoothing=0.1))


@pytest.mark.parametrize(("shape", "key"), [((6, 5), "label"), ((2, 3, 5), "labels")])
def test_cross_entropy_finds_its_target(shape, key):
    (logits,) = draw(shape)
    target = torch.arange(6).view(shape[:-1]) % 5
    found = CrossEntropy()(Outputs(logits), Outputs(), batch_of(shape[0], **{key: target}))
    torch.testing.assert_close(found, F.cross_entropy(logits.flatten(0, -2), target.flatten()))


@pytest.mark.parametrize(
    ("loss", "shape", "key"),
    [(CrossEntropy(), (6, 5), "label"), (DKD(), (2, 3, 5), "labels"), (DKD(), (2, 5, 3, 3), "mask")],
)
def test_losses_on_labels_say_which_key_is_missing(loss, shape, key):
    student, teacher = draw(shape, shape)
    with pytest.raises(DataError, match=f"needs labels, but the data's batches have no {key!r}, only image, index"):
        loss(Outputs(student), Outputs(teacher), batch_of(shape[0]))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 5, 3, 3)])
def test_kd_and_dist_need_no_labels(shape):
    student, teacher = draw(shape, shape)
    for name in ("kd", "dist"):
        found = value(name, student, teacher, batch_of(shape[0]))
        torch.testing.assert_close(found, reference(name, student, teacher, None))


def test_counts_are_the_units_that_a_value_is_a_mean_over():
    label = torch.tensor([0, 1, IGNORE, 2])
    mask = dense()[2]
    labels = torch.tensor([[1, 2, IGNORE], [3, IGNORE, IGNORE]])
    samples, pixels, tokens = batch_of(4, label=label), batch_of(2, mask=mask), batch_of(2, labels=labels)
    assert [KD().count(b).item() for b in (samples, pixels, tokens)] == [4, 2 * 192, 3]
    for loss in (CrossEntropy(), DKD()):
        assert [loss.count(b).item() for b in (samples, pixels, tokens)] == [3, 2 * 192, 3]
    for loss in (AT(), FitNets()):
        assert [loss.count(b).item() for b in (samples, pixels, tokens)] == [4, 2, 2]


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_the_mean_over_a_batch_is_the_mean_over_its_parts_weighted_by_their_counts(name):
    student, teacher = draw((6, 7, 5), (6, 7, 5))
    labels = torch.randint(5, (6, 7), generator=torch.Generator().manual_seed(3))
    labels[0], labels[3, 2:] = IGNORE, IGNORE
    parts = [
        (s, t, batch_of(2, labels=y)) for s, t, y in zip(*(x.split(2) for x in (student, teacher, labels)), strict=True)
    ]
    counts = [MAKE[name]().count(b) for _, _, b in parts]
    means = [value(name, *part) for part in parts]
    together = sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, value(name, student, teacher, batch_of(6, labels=labels)))


class Net(nn.Module):
    """Two convolutions, an image classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(F.relu(self.second(F.relu(self.first(image)))).mean((2, 3)))


class Tokens(nn.Module):
    """A classifier whose layer gives `[B, N, D]`, like a vision transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.first(image[:, 0]).mean(1))


def model(net: nn.Module) -> Model:
    return Model(net, stages=[name for name in ("first", "second") if hasattr(net, name)])


def images() -> dict[str, Tensor]:
    (image,) = draw((4, 1, 8, 8))
    return {"image": image, "label": torch.arange(4), "index": torch.arange(4)}


def distilled(loss: nn.Module, student: nn.Module | None = None) -> Distill:
    torch.manual_seed(0)
    terms = [Weighted(loss, name="features"), Weighted(CrossEntropy(), name="cross-entropy")]
    stage = Distill(model(student or Net(2)), terms, model(Net(4)))
    stage.prepare(images())
    return stage


@pytest.mark.parametrize("layers", [["@all"], ["@1"], ["first"]])
def test_fitnets_makes_a_regressor_per_pair_of_layers_from_the_first_batch(layers):
    loss = FitNets(FitNetsOptions(student_layers=layers, teacher_layers=layers))
    assert not list(loss.parameters())
    distilled(loss)
    assert len(loss.adapters) == len(loss.names["student"])


def test_fitnets_regressors_are_trained_and_kept_with_the_stage_but_not_with_the_student(tmp_path):
    loss = FitNets()
    stage = distilled(loss)
    mine = {name for name in stage.state_dict() if "adapters" in name}
    assert {name.removeprefix("losses.features.adapters.0.") for name in mine} >= {"conv.weight", "bn.running_mean"}
    before = loss.adapters[0].conv.weight.detach().clone()
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    sum(stage(images()).values()).backward()
    optimizer.step()
    assert not torch.equal(before, loss.adapters[0].conv.weight)
    stage.student.save(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(Net(2).state_dict())


def test_fitnets_and_at_are_the_sums_over_their_layers():
    for make, options in ((FitNets, FitNetsOptions), (AT, ATOptions)):
        loss = make(options(student_layers=["@all"], teacher_layers=["@all"]))
        stage = distilled(loss)
        stage.eval()
        student, teacher = stage.student(images()), stage.teachers["teacher"](images())
        pairs = loss.pairs(student, teacher, images())
        adapters = loss.adapters if make is FitNets else [nn.Identity()] * 2
        function = functional.fitnet if make is FitNets else functional.at
        expected = sum(function(adapter(s), t) for adapter, (s, t) in zip(adapters, pairs, strict=True))
        torch.testing.assert_close(loss(student, teacher, images()), expected)


def test_at_takes_mode_and_power_from_its_options():
    loss = AT(ATOptions(mode="paper", p=4))
    stage = distilled(loss)
    student, teacher = stage.student(images()), stage.teachers["teacher"](images())
    ours, theirs = zip(*loss.pairs(student, teacher, images()), strict=True)
    expected = functional.at(ours, theirs, mode="paper", p=4)
    torch.testing.assert_close(loss(student, teacher, images()), expected)


@pytest.mark.parametrize(("make", "options"), [(FitNets, FitNetsOptions), (AT, ATOptions)])
def test_unequal_numbers_of_layers_are_refused_with_the_names_of_both(make, options):
    loss = make(options(student_layers=["first"], teacher_layers=["@all"]))
    with pytest.raises(ModelError, match=r"student has 1 \(first\) and the teacher 2 \(first, second\); set"):
        distilled(loss)


@pytest.mark.parametrize(("make", "options"), [(FitNets, FitNetsOptions), (AT, ATOptions)])
def test_positions_that_make_no_square_are_refused_with_the_layer(make, options):
    loss = make(options(student_layers=["first"], teacher_layers=["first"]))
    with pytest.raises(ModelError, match=r"the student's layers first: give 8 positions, which make no square"):
        distilled(loss, Tokens())


def test_a_layer_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(ModelError, match="matches no module"):
        distilled(AT(ATOptions(student_layers=["frist"], teacher_layers=["first"])))


def test_dist_over_two_processes_equals_dist_over_one(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    processes = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    spec = importlib.util.spec_from_file_location("two_processes", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss, gradient = module.loss_and_gradient(slice(None))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for theirs, _ in found:
        torch.testing.assert_close(theirs, loss)
    torch.testing.assert_close((found[0][1] + found[1][1]) / 2, gradient)
    apart = [module.loss_and_gradient(slice(start, start + 4))[0] for start in (0, 4)]
    assert abs(sum(apart) / 2 - loss) > 1e-3  # so that the comparison would notice if nothing were gathered
