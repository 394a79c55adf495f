"""Trainable parts of the classic methods: they learn with the student and stay out of the exported model."""

from collections.abc import Sequence

from torch import Tensor, nn


class Regressor(nn.Module):
    """Convolution, batch norm and ReLU that bring a student's feature map to the teacher's shape.

    Source: Romero et al. 2015, FitNets (arXiv 1412.6550), section 2.2, in the form of the usual CIFAR benchmarks. The
    kernel follows from the two sizes: stride 2 to halve, a transposed convolution to double, otherwise an unpadded
    kernel that takes off the surplus rows and columns.

    Args:
        student_shape: ``(B, Ch, H, W)`` of the student's features; the batch size does not matter.
        teacher_shape: ``(B, Ch, H, W)`` of the teacher's.
        relu: end with a ReLU, for teacher features taken after theirs.

    Raises:
        ValueError: if a shape is not four-dimensional or no convolution of the rule fits.

    Example:
        >>> regressor = Regressor((64, 8, 16, 16), (64, 32, 8, 8))
        >>> regressor(torch.zeros(2, 8, 16, 16)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int], *, relu: bool = True) -> None:
        super().__init__()
        self.conv = _matching_convolution(tuple(student_shape), tuple(teacher_shape))
        self.bn = nn.BatchNorm2d(teacher_shape[1])
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """``[B, Ch_s, H_s, W_s]`` to ``[B, Ch_t, H_t, W_t]``."""
        projected: Tensor = self.activation(self.bn(self.conv(features)))
        return projected


def _matching_convolution(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Conv2d | nn.ConvTranspose2d:
    if len(student) != 4 or len(teacher) != 4:
        raise ValueError(f"FitNets needs feature maps (B, Ch, H, W), but got shapes {student} and {teacher}")
    (_, channels_in, height, width), (_, channels_out, out_height, out_width) = student, teacher
    # A 3x3 kernel of stride 2 and padding 1 rounds an odd width up.
    if height == 2 * out_height and (width + 1) // 2 == out_width:
        return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1)
    if (2 * height, 2 * width) == (out_height, out_width):
        return nn.ConvTranspose2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1)
    if height >= out_height and width >= out_width:
        return nn.Conv2d(channels_in, channels_out, kernel_size=(1 + height - out_height, 1 + width - out_width))
    raise ValueError(
        f"no regressor from student features of {height}x{width} to teacher features of {out_height}x{out_width}: "
        "the student's must be at least as large or exactly half as large; choose another pair of layers"
    )
