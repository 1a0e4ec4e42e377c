"""Ready networks: `create` by name, or each by its own function."""

from fastblocks.models.mobilenet_v2 import MobileNetV2, mobilenet_v2, mobilenet_v2_x0_75, mobilenet_v2_x1_4
from fastblocks.models.registry import create, list

__all__ = [
    "MobileNetV2",
    "create",
    "list",
    "mobilenet_v2",
    "mobilenet_v2_x0_75",
    "mobilenet_v2_x1_4",
]
