import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_acam_kd.losses import ACAM
from kd_acam_kd.modules import STCAFF, Level
from kd_acam_kd.options import ACAMLossOptions
from kdcore import Outputs
from kdcore.errors import ModelError, RunFailed
from kdcore.losses import Progress

CHANNELS, SIZE, MASKS = 16, 8, 6
SIX = {"num_masks": MASKS}


def maps(seed: int, channels: int = CHANNELS, size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed))


def level(**options) -> Level:
    torch.manual_seed(0)
    return Level(CHANNELS, CHANNELS, MASKS, ACAMLossOptions(**options))


def made(student: Tensor, teacher: Tensor, **options) -> tuple[ACAM, dict[str, Tensor]]:
    torch.manual_seed(0)
    loss = ACAM(ACAMLossOptions(**{**SIX, **options}))
    return loss, call(loss, student, teacher)


def call(loss: ACAM, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    return loss(Outputs(student), Outputs(teacher), {"index": torch.arange(len(student))})


def test_fresh_masks_are_one_half_everywhere():
    student, teacher = maps(0), maps(1)
    loss, terms = made(student, teacher)
    mse = F.mse_loss(student, teacher).item()
    assert terms["channel"].item() == pytest.approx(0.5 * mse, abs=0.05 * mse)
    assert terms["spatial"].item() == pytest.approx(0.5 * mse, abs=0.05 * mse)
    assert terms["diversity"].item() == pytest.approx(2, rel=0.01)
    assert loss.mask_means["spatial"].item() == pytest.approx(0.5, abs=0.05)


def test_equal_maps_leave_only_the_diversity():
    _, terms = made(maps(0), maps(0))
    assert terms["channel"] == terms["spatial"] == 0
    assert terms["diversity"] > 0


@pytest.mark.parametrize("query_from", ["teacher", "student"])
def test_masks_depend_on_both_nets(query_from):
    modules = level(query_from=query_from)
    for unit in modules.selection.units.values():
        nn.init.normal_(unit)
    before = modules.masks(maps(0), maps(1))
    for changed in (modules.masks(maps(2), maps(1)), modules.masks(maps(0), maps(2))):
        assert all((changed[kind] - before[kind]).abs().max() > 1e-4 for kind in ("channel", "spatial"))


def test_who_asks_gives_the_positions_and_who_answers_the_values():
    torch.manual_seed(0)
    fusion, constant = STCAFF(CHANNELS), maps(0, size=(1, 1)).expand(-1, -1, SIZE, SIZE)
    from_constant, to_constant = fusion(maps(1), constant), fusion(constant, maps(1))
    torch.testing.assert_close(from_constant, fusion.value(constant), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(to_constant, to_constant[..., :1, :1].expand_as(to_constant), atol=1e-5, rtol=1e-4)
    varied = fusion(maps(1), maps(2))
    assert varied.std((2, 3)).min() > 1e-4


def test_fusion_against_the_formula():
    torch.manual_seed(0)
    fusion, teacher, student = STCAFF(19), maps(0, 19), maps(1, 19)
    assert fusion.query.out_channels == fusion.key.out_channels == 9
    q, k, v = (f(x).flatten(2) for f, x in ((fusion.query, teacher), (fusion.key, student), (fusion.value, student)))
    attention = (q.mT @ k / 3).softmax(2)
    torch.testing.assert_close(fusion(teacher, student), (attention @ v.mT).mT.unflatten(2, (SIZE, SIZE)))


def test_diversity_alone_tells_the_masks_apart():
    student, teacher = maps(0), maps(1)
    loss, terms = made(student, teacher, masks=["spatial"], alpha=0)
    assert terms["diversity"].item() == pytest.approx(1, abs=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        call(loss, student, teacher)["diversity"].backward()
        optimizer.step()
    assert call(loss, student, teacher)["diversity"] < 0.6


def test_everything_the_masks_are_made_of_is_trained_by_their_diversity():
    loss, terms = made(maps(0), maps(1))
    terms["diversity"].backward()
    modules = loss.levels[0]
    for parameter in (modules.fusion.query.weight, modules.fusion.key.weight, modules.fusion.value.weight,
                      modules.selection.units["channel"], modules.selection.units["spatial"]):  # fmt: skip
        assert parameter.grad.abs().max() > 0


def trained(steps: int, **options) -> tuple[ACAM, list[float]]:
    """The loss after joint steps with a student that is a free map, and the means of its masks along the way."""
    student, teacher = maps(0).requires_grad_(), maps(1)
    noise = torch.Generator().manual_seed(2)
    loss, _ = made(student, teacher, **options)
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.01)
    means = []
    for step in range(steps):
        loss.progress = Progress(step=step)
        seen = teacher + torch.randn(teacher.shape, generator=noise)  # what no student can imitate
        optimizer.zero_grad()
        sum(call(loss, student, seen).values()).backward()
        optimizer.step()
        means.append(min(mean.item() for mean in loss.mask_means.values()))
    return loss, means


@pytest.mark.parametrize("options", [{}, {"mask_grad": "full", "mask_weight": "linear"}])
def test_masks_stay_open(options):
    assert min(trained(200, **options)[1]) > 0.05


def test_masks_vanish_where_squared_errors_train_them():
    options = {"mask_grad": "full", "masks": ["spatial"]}
    assert trained(300, **options, min_mask=0)[1][-1] < 0.02
    with pytest.raises(RunFailed, match=r"collapsed at step \d+.*diversity_only"):
        trained(300, **options)


def test_masked_errors_train_the_masks_only_if_asked_to():
    for grad, expected in (("diversity_only", False), ("full", True)):
        loss, terms = made(maps(0), maps(1), mask_grad=grad)
        (terms["channel"] + terms["spatial"] + 0 * terms["diversity"]).backward()
        unit = loss.levels[0].selection.units["spatial"].grad
        assert bool(unit.abs().max() > 0) is expected


def test_masks_send_the_student_a_gradient_only_if_asked_to():
    for detach in (True, False):
        student = maps(0).requires_grad_()
        _, terms = made(student, maps(1), detach_student_in_fusion=detach)
        (gradient,) = torch.autograd.grad(terms["diversity"], student, allow_unused=True)
        assert (gradient is None) is detach


def test_teacher_gets_no_gradient():
    teacher = maps(1).requires_grad_()
    _, terms = made(maps(0).requires_grad_(), teacher, mask_grad="full", detach_student_in_fusion=False)
    sum(terms.values()).backward()
    assert teacher.grad is None


def test_weights_enter_the_terms():
    plain, weighted = (made(maps(0), maps(1), **o)[1] for o in ({}, {"alpha": 3, "lambda_div": 0.5}))
    torch.testing.assert_close(weighted, {k: v * (0.5 if k == "diversity" else 3) for k, v in plain.items()})


@pytest.mark.parametrize("kind", ["channel", "spatial"])
def test_one_kind_of_masks_alone(kind):
    loss, terms = made(maps(0), maps(1), masks=[kind])
    assert set(terms) == {kind, "diversity"}
    assert set(loss.levels[0].selection.units) == {kind}


def test_full_units_have_a_gain_for_each_channel():
    fused, (scalar, full) = maps(0), (level(channel_units=u).selection for u in ("scalar", "full"))
    assert scalar.units["channel"].shape == (MASKS, 1)
    assert full.units["channel"].shape == (MASKS, CHANNELS)
    nn.init.normal_(scalar.units["channel"])
    nn.init.normal_(full.units["channel"])
    order = fused.mean((2, 3)).argsort(1)
    steps = [units(fused)["channel"].gather(2, order[:, None].expand(-1, MASKS, -1)).diff() for units in (scalar, full)]
    monotone = [((step >= 0).all(2) | (step <= 0).all(2)) for step in steps]
    assert monotone[0].all()
    assert not monotone[1].any()


def test_other_channels_and_sizes_of_the_student_are_brought_to_the_teachers():
    student, teacher = maps(0, 8, (4, 6)).requires_grad_(), maps(1, CHANNELS, (8, 12))
    loss, terms = made(student, teacher)
    align = loss.levels[0].align
    resized = F.interpolate(align(student), (8, 12), mode="bilinear", align_corners=False)
    mse = F.mse_loss(resized, teacher).item()
    assert terms["spatial"].item() == pytest.approx(0.5 * mse, abs=0.05 * mse)
    sum(terms.values()).backward()
    assert align.weight.grad.abs().max() > 0
    assert student.grad.abs().max() > 0


def test_large_maps_are_pooled_for_the_attention():
    student, teacher = (F.interpolate(maps(i, size=(4, 6)), (16, 24), mode="bilinear") for i in (0, 1))
    whole, pooled = (level(max_tokens=most) for most in (None, 100))
    for modules in (whole, pooled):
        torch.manual_seed(1)
        nn.init.normal_(modules.selection.units["spatial"])
    seen = []
    pooled.fusion.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    found, expected = pooled.masks(student, teacher), whole.masks(student, teacher)
    assert seen == [(2, CHANNELS, 8, 12)]
    assert found["spatial"].shape == expected["spatial"].shape == (2, MASKS, 16 * 24)
    assert (found["spatial"] - expected["spatial"]).abs().mean() < 0.05


def test_terms_of_parts_combine_to_those_of_the_whole():
    student, teacher = maps(0), maps(1)
    loss, whole = made(student, teacher)
    parts = [call(loss, student[i : i + 1], teacher[i : i + 1]) for i in range(2)]
    torch.testing.assert_close({k: (parts[0][k] + parts[1][k]) / 2 for k in whole}, whole)
    assert loss.count({"index": torch.arange(2)}) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = ((100 * maps(i)).to(dtype) for i in (0, 1))
    student.requires_grad_()
    loss, _ = made(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = call(loss, student, teacher)
    sum(terms.values()).backward()
    torch.testing.assert_close(terms, call(loss, student.float(), teacher.float()))
    assert student.grad.isfinite().all()


def test_number_of_masks_is_that_of_the_classes():
    for options, expected in (({"num_masks": None}, 5), ({"num_masks": 3}, 3)):
        loss, _ = made(maps(0, 5), maps(1, 5), **options)
        assert len(loss.levels[0].selection.units["channel"]) == expected


def test_levels_are_added_up():
    loss, one = made(maps(0), maps(1))
    loss = ACAM(ACAMLossOptions(**SIX, levels=["a", "b"]))
    loss.names = {"student": ["a", "b"], "teacher": ["a", "b"]}
    torch.manual_seed(0)
    both = loss(*(Outputs(features={"a": maps(i), "b": maps(i)}) for i in (0, 1)), {"index": torch.arange(2)})
    assert len(loss.levels) == 2
    assert both["spatial"].item() == pytest.approx(2 * one["spatial"].item(), rel=0.05)


@pytest.mark.parametrize("shape", [(2, 5), (2, 7, 5)])
def test_logits_that_are_no_map_get_a_clear_sentence(shape):
    with pytest.raises(ModelError, match=r"student's level logits: gives \[2.*no map.*name other levels"):
        made(torch.randn(shape), torch.randn(shape))
