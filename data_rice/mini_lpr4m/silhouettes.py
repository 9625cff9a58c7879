"""The 34 product categories of the mini LPR4M and their outlines.

An outline is a few primitives on the unit square (x right, y down). ``back`` is drawn before the body and ``front``
after it. Both have the product's part colour, so handles, soles and lids distinguish a category. The pattern covers
only the body.

Primitives: ``("poly", x, y, x, y, ...)``, ``("oval", left, top, right, bottom)``, ``("rect", left, top, right, bottom,
corner_radius)``, ``("line", width, x, y, x, y, ...)`` and ``("ring", width, left, top, right, bottom)``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Silhouette:
    """One category.

    Args:
        name: English category name, as written to the annotation files.
        name_zh: Chinese category name, used in titles and ASR.
        body, back, front: primitives on the unit square.
        mark: centre (x, y) and diameter of the printed emblem, in units of the square's side.
    """

    name: str
    name_zh: str
    body: tuple
    mark: tuple[float, float, float]
    back: tuple = ()
    front: tuple = ()


def _poly(points: str) -> tuple:
    """Polygon primitive from "x,y x,y ..." in hundredths of the square."""
    return ("poly", *(float(value) / 100 for point in points.split() for value in point.split(",")))


SILHOUETTES = (
    Silhouette(
        "t-shirt",
        "T恤",
        body=(_poly("28,8 72,8 98,30 86,48 75,40 75,95 25,95 25,40 14,48 2,30"),),
        front=(("oval", 0.40, 0.02, 0.60, 0.16),),
        mark=(0.50, 0.52, 0.40),
    ),
    Silhouette(
        "sweater",
        "毛衣",
        body=(_poly("30,8 70,8 86,20 98,84 82,88 73,46 73,94 27,94 27,46 18,88 2,84 14,20"),),
        front=(("rect", 0.36, 0.04, 0.64, 0.13, 0.03), ("rect", 0.27, 0.86, 0.73, 0.95, 0.01)),
        mark=(0.50, 0.48, 0.38),
    ),
    Silhouette(
        "dress",
        "连衣裙",
        body=(_poly("34,4 42,14 58,14 66,4 70,34 64,44 94,96 6,96 36,44 30,34"),),
        front=(("rect", 0.34, 0.39, 0.66, 0.46, 0.01),),
        mark=(0.50, 0.70, 0.40),
    ),
    Silhouette(
        "skirt",
        "半身裙",
        body=(_poly("28,10 72,10 98,92 2,92"),),
        front=(("rect", 0.26, 0.06, 0.74, 0.18, 0.02),),
        mark=(0.50, 0.58, 0.42),
    ),
    Silhouette(
        "trousers",
        "长裤",
        body=(_poly("22,4 78,4 88,97 60,97 50,40 40,97 12,97"),),
        front=(("rect", 0.21, 0.03, 0.79, 0.13, 0.02),),
        mark=(0.50, 0.29, 0.34),
    ),
    Silhouette(
        "shorts",
        "短裤",
        body=(_poly("14,14 86,14 98,84 56,86 50,62 44,86 2,84"),),
        front=(("rect", 0.13, 0.12, 0.87, 0.24, 0.02),),
        mark=(0.50, 0.43, 0.36),
    ),
    Silhouette(
        "coat",
        "外套",
        body=(_poly("28,4 72,4 96,24 96,70 82,70 80,40 84,97 16,97 20,40 18,70 4,70 4,24"),),
        front=(_poly("36,4 64,4 50,34"), ("line", 0.035, 0.50, 0.30, 0.50, 0.97)),
        mark=(0.50, 0.60, 0.38),
    ),
    Silhouette(
        "vest",
        "背心",
        body=(_poly("26,4 38,4 44,22 56,22 62,4 74,4 74,28 88,42 86,96 14,96 12,42 26,28"),),
        front=(("rect", 0.14, 0.88, 0.86, 0.96, 0.01),),
        mark=(0.50, 0.56, 0.42),
    ),
    Silhouette(
        "sock",
        "袜子",
        body=(_poly("30,4 74,4 74,56 70,78 50,95 14,95 6,78 14,68 30,60"),),
        front=(("rect", 0.28, 0.03, 0.76, 0.17, 0.02), ("oval", 0.03, 0.70, 0.24, 0.96)),
        mark=(0.52, 0.42, 0.36),
    ),
    Silhouette(
        "cap",
        "棒球帽",
        body=(_poly("10,64 12,42 24,24 44,17 60,19 74,30 82,46 84,64"),),
        front=(_poly("10,60 82,60 99,74 96,82 60,74 10,72"), ("oval", 0.40, 0.11, 0.52, 0.20)),
        mark=(0.46, 0.42, 0.34),
    ),
    Silhouette(
        "beanie",
        "毛线帽",
        body=(_poly("8,78 12,50 26,30 50,22 74,30 88,50 92,78"),),
        front=(("rect", 0.05, 0.72, 0.95, 0.94, 0.06), ("oval", 0.39, 0.04, 0.61, 0.25)),
        mark=(0.50, 0.50, 0.34),
    ),
    Silhouette(
        "mitten",
        "手套",
        body=(
            ("rect", 0.30, 0.04, 0.86, 0.80, 0.26),
            _poly("34,70 6,50 3,38 14,30 36,44"),
            ("rect", 0.32, 0.50, 0.84, 0.90, 0.02),
        ),
        front=(("rect", 0.28, 0.82, 0.88, 0.96, 0.03),),
        mark=(0.58, 0.44, 0.38),
    ),
    Silhouette(
        "sneaker",
        "运动鞋",
        body=(_poly("4,30 34,26 48,44 76,52 97,66 97,80 4,80"),),
        front=(
            ("rect", 0.02, 0.76, 0.99, 0.90, 0.05),
            ("line", 0.035, 0.44, 0.36, 0.54, 0.50),
            ("line", 0.035, 0.37, 0.42, 0.47, 0.56),
        ),
        mark=(0.24, 0.54, 0.32),
    ),
    Silhouette(
        "boot",
        "靴子",
        body=(_poly("22,5 66,5 66,54 92,68 97,86 20,86"),),
        front=(("rect", 0.18, 0.84, 0.99, 0.96, 0.03), ("rect", 0.20, 0.04, 0.68, 0.15, 0.02)),
        mark=(0.44, 0.38, 0.36),
    ),
    Silhouette(
        "apron",
        "围裙",
        body=(_poly("34,18 66,18 70,44 92,52 88,97 12,97 8,52 30,44"),),
        back=(("ring", 0.035, 0.34, 0.02, 0.66, 0.38),),
        front=(("rect", 0.06, 0.46, 0.94, 0.53, 0.02),),
        mark=(0.50, 0.73, 0.36),
    ),
    Silhouette(
        "handbag",
        "手提包",
        body=(_poly("14,40 86,40 97,94 3,94"),),
        back=(("ring", 0.06, 0.26, 0.05, 0.74, 0.75),),
        front=(("rect", 0.12, 0.37, 0.88, 0.46, 0.03),),
        mark=(0.50, 0.69, 0.38),
    ),
    Silhouette(
        "backpack",
        "双肩包",
        body=(("rect", 0.16, 0.10, 0.84, 0.95, 0.22),),
        back=(
            ("ring", 0.05, 0.36, 0.02, 0.64, 0.24),
            ("rect", 0.04, 0.44, 0.24, 0.84, 0.08),
            ("rect", 0.76, 0.44, 0.96, 0.84, 0.08),
        ),
        front=(("line", 0.04, 0.18, 0.66, 0.82, 0.66),),
        mark=(0.50, 0.40, 0.38),
    ),
    Silhouette(
        "suitcase",
        "行李箱",
        body=(("rect", 0.16, 0.24, 0.84, 0.90, 0.08),),
        back=(("ring", 0.05, 0.34, 0.03, 0.66, 0.44),),
        front=(
            ("oval", 0.20, 0.87, 0.34, 0.99),
            ("oval", 0.66, 0.87, 0.80, 0.99),
            ("rect", 0.16, 0.24, 0.24, 0.90, 0.03),
            ("rect", 0.76, 0.24, 0.84, 0.90, 0.03),
        ),
        mark=(0.50, 0.57, 0.40),
    ),
    Silhouette(
        "umbrella",
        "雨伞",
        body=(_poly("2,54 8,32 26,14 50,7 74,14 92,32 98,54 82,47 66,54 50,47 34,54 18,47"),),
        back=(
            ("line", 0.05, 0.50, 0.10, 0.50, 0.88),
            ("line", 0.05, 0.50, 0.92, 0.40, 0.97, 0.32, 0.88),
            ("line", 0.05, 0.50, 0.02, 0.50, 0.1),
        ),
        mark=(0.50, 0.31, 0.32),
    ),
    Silhouette(
        "cushion",
        "抱枕",
        body=(_poly("3,5 50,13 97,5 89,50 97,95 50,87 3,95 11,50"),),
        front=(
            ("oval", 0.01, 0.02, 0.13, 0.14),
            ("oval", 0.87, 0.02, 0.99, 0.14),
            ("oval", 0.01, 0.86, 0.13, 0.98),
            ("oval", 0.87, 0.86, 0.99, 0.98),
        ),
        mark=(0.50, 0.50, 0.44),
    ),
    Silhouette(
        "mug",
        "马克杯",
        body=(("rect", 0.06, 0.14, 0.70, 0.92, 0.08),),
        back=(("ring", 0.08, 0.56, 0.28, 0.97, 0.74),),
        front=(("rect", 0.04, 0.12, 0.72, 0.21, 0.03),),
        mark=(0.38, 0.55, 0.40),
    ),
    Silhouette(
        "bottle",
        "水瓶",
        body=(("rect", 0.26, 0.32, 0.74, 0.97, 0.08), _poly("40,16 60,16 74,40 26,40")),
        front=(("rect", 0.37, 0.03, 0.63, 0.19, 0.03),),
        mark=(0.50, 0.62, 0.40),
    ),
    Silhouette(
        "bowl",
        "碗",
        body=(_poly("2,26 98,26 90,58 72,80 28,80 10,58"),),
        front=(("rect", 0.01, 0.21, 0.99, 0.31, 0.03), ("rect", 0.32, 0.78, 0.68, 0.90, 0.02)),
        mark=(0.50, 0.54, 0.36),
    ),
    Silhouette(
        "teapot",
        "茶壶",
        body=(("oval", 0.16, 0.26, 0.80, 0.92), _poly("74,66 99,32 88,28 70,48")),
        back=(("ring", 0.065, 0.01, 0.34, 0.38, 0.78),),
        front=(("oval", 0.32, 0.20, 0.64, 0.34), ("oval", 0.42, 0.09, 0.54, 0.22)),
        mark=(0.48, 0.60, 0.38),
    ),
    Silhouette(
        "vase",
        "花瓶",
        body=(
            ("oval", 0.14, 0.34, 0.86, 0.92),
            _poly("38,10 62,10 58,44 42,44"),
            ("rect", 0.34, 0.84, 0.66, 0.97, 0.01),
        ),
        front=(("oval", 0.30, 0.04, 0.70, 0.16),),
        mark=(0.50, 0.63, 0.40),
    ),
    Silhouette(
        "lamp",
        "台灯",
        body=(_poly("30,5 70,5 96,62 4,62"),),
        back=(("rect", 0.46, 0.58, 0.54, 0.90, 0.01),),
        front=(("oval", 0.24, 0.84, 0.76, 0.98), ("rect", 0.04, 0.57, 0.96, 0.63, 0.01)),
        mark=(0.50, 0.36, 0.36),
    ),
    Silhouette(
        "can",
        "罐头",
        body=(("rect", 0.20, 0.12, 0.80, 0.90, 0.02),),
        front=(("oval", 0.20, 0.03, 0.80, 0.21), ("rect", 0.20, 0.86, 0.80, 0.95, 0.04)),
        mark=(0.50, 0.54, 0.42),
    ),
    Silhouette(
        "gift box",
        "礼盒",
        body=(("rect", 0.08, 0.34, 0.92, 0.96, 0.02),),
        front=(("rect", 0.04, 0.24, 0.96, 0.40, 0.02), _poly("50,24 26,4 20,20"), _poly("50,24 74,4 80,20")),
        mark=(0.50, 0.67, 0.42),
    ),
    Silhouette(
        "snack bag",
        "零食袋",
        body=(_poly("16,6 84,6 92,50 84,94 16,94 8,50"),),
        front=(("rect", 0.14, 0.03, 0.86, 0.12, 0.0), ("rect", 0.14, 0.88, 0.86, 0.97, 0.0)),
        mark=(0.50, 0.50, 0.44),
    ),
    Silhouette(
        "jar",
        "果酱瓶",
        body=(("rect", 0.14, 0.22, 0.86, 0.97, 0.18),),
        front=(("rect", 0.22, 0.04, 0.78, 0.24, 0.04),),
        mark=(0.50, 0.60, 0.42),
    ),
    Silhouette(
        "cream tube",
        "护肤霜",
        body=(_poly("20,3 80,3 66,82 34,82"),),
        front=(("rect", 0.36, 0.80, 0.64, 0.97, 0.03), ("rect", 0.19, 0.02, 0.81, 0.10, 0.0)),
        mark=(0.50, 0.38, 0.38),
    ),
    Silhouette(
        "perfume",
        "香水",
        body=(_poly("26,38 74,38 92,56 92,96 8,96 8,56"),),
        front=(("rect", 0.34, 0.04, 0.66, 0.26, 0.02), ("rect", 0.42, 0.24, 0.58, 0.40, 0.0)),
        mark=(0.50, 0.68, 0.40),
    ),
    Silhouette(
        "toy bear",
        "玩具熊",
        body=(
            ("oval", 0.24, 0.04, 0.76, 0.50),
            ("oval", 0.20, 0.42, 0.80, 0.96),
            ("oval", 0.02, 0.48, 0.30, 0.72),
            ("oval", 0.70, 0.48, 0.98, 0.72),
        ),
        back=(
            ("oval", 0.16, 0.01, 0.38, 0.23),
            ("oval", 0.62, 0.01, 0.84, 0.23),
            ("oval", 0.12, 0.80, 0.40, 0.99),
            ("oval", 0.60, 0.80, 0.88, 0.99),
        ),
        front=(("oval", 0.40, 0.28, 0.60, 0.43),),
        mark=(0.50, 0.68, 0.38),
    ),
    Silhouette(
        "kite",
        "风筝",
        body=(_poly("50,2 92,36 50,86 8,36"),),
        back=(
            ("line", 0.04, 0.50, 0.84, 0.60, 0.92, 0.48, 0.98),
            _poly("62,86 78,86 70,97"),
            _poly("36,86 22,86 30,97"),
        ),
        front=(("line", 0.03, 0.08, 0.36, 0.92, 0.36),),
        mark=(0.50, 0.38, 0.36),
    ),
)
