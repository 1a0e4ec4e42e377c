"""Ready networks: `create` by name, or each by its own function."""

from fastblocks.models.convert import convert_shuffle, from_timm
from fastblocks.models.mobilenet_v1 import (
    MobileNetV1,
    mobilenet_v1,
    mobilenet_v1_x0_5,
    mobilenet_v1_x0_25,
    mobilenet_v1_x0_75,
)
from fastblocks.models.mobilenet_v2 import MobileNetV2, mobilenet_v2, mobilenet_v2_x0_75, mobilenet_v2_x1_4
from fastblocks.models.registry import create, list
from fastblocks.models.shufflenet_v1 import (
    ShuffleNetV1,
    shufflenet_v1,
    shufflenet_v1_g1,
    shufflenet_v1_g2,
    shufflenet_v1_g3,
    shufflenet_v1_g3_x0_5,
    shufflenet_v1_g3_x1_5,
    shufflenet_v1_g3_x2_0,
    shufflenet_v1_g4,
    shufflenet_v1_g8,
    shufflenet_v1_g8_x0_5,
)
from fastblocks.models.shufflenet_v2 import (
    ShuffleNetV2,
    shufflenet_v2_x0_5,
    shufflenet_v2_x1_0,
    shufflenet_v2_x1_5,
    shufflenet_v2_x2_0,
)

__all__ = [
    "MobileNetV1",
    "MobileNetV2",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "convert_shuffle",
    "create",
    "from_timm",
    "list",
    "mobilenet_v1",
    "mobilenet_v1_x0_5",
    "mobilenet_v1_x0_25",
    "mobilenet_v1_x0_75",
    "mobilenet_v2",
    "mobilenet_v2_x0_75",
    "mobilenet_v2_x1_4",
    "shufflenet_v1",
    "shufflenet_v1_g1",
    "shufflenet_v1_g2",
    "shufflenet_v1_g3",
    "shufflenet_v1_g3_x0_5",
    "shufflenet_v1_g3_x1_5",
    "shufflenet_v1_g3_x2_0",
    "shufflenet_v1_g4",
    "shufflenet_v1_g8",
    "shufflenet_v1_g8_x0_5",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
]
