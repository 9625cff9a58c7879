"""Titles and speech of the mini LPR4M, in Chinese or English, with the noise of real shops and speech recognition."""

import random

from .products import Product

COLORS_ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "teal": "青色", "blue": "蓝色",
    "navy": "藏青色", "purple": "紫色", "pink": "粉色", "brown": "棕色", "white": "白色", "black": "黑色",
}  # fmt: skip
PATTERNS_ZH = {
    "plain": "纯色", "stripes": "横条纹", "pinstripes": "竖条纹", "diagonals": "斜条纹", "checks": "棋盘格",
    "dots": "波点", "two-tone": "拼色", "zigzag": "锯齿纹", "grid": "格子", "rings": "圆环纹",
}  # fmt: skip
EMBLEMS_ZH = {
    "disc": "圆点", "square": "方块", "triangle": "三角", "star": "星星", "cross": "十字", "heart": "爱心",
    "ring": "圆圈", "moon": "月亮", "bolt": "闪电", "bars": "横杠",
}  # fmt: skip
_SHOP_WORDS_ZH = ("新款", "爆款", "包邮", "网红同款", "百搭", "高级感", "小众设计", "厂家直销", "秋冬", "限时特惠")
_SHOP_WORDS_EN = ("new", "hot sale", "free shipping", "trendy", "premium", "2026", "best price", "limited")
_SPEECH_ZH = (
    "宝宝们看一下这款", "来 三二一上链接", "家人们这个真的很好看", "今天直播间给大家福利价", "喜欢的扣一",
    "还剩最后几件", "主播身上也有同款", "我给大家看一下细节", "点一点右下角小黄车",
    "库存不多了", "这个面料摸起来特别舒服",
)  # fmt: skip
_SPEECH_EN = (
    "okay guys look at this one", "three two one the link is up", "so pretty right", "only a few left",
    "tap the yellow basket", "let me show you the details", "special price for the live room today",
    "type one if you like it", "we ship it tonight", "feels really nice in the hand",
)  # fmt: skip


def _phrase(product: Product, chinese: bool, rng: random.Random, keep: float) -> str:
    """Name of the product with each attribute mentioned with probability ``keep``."""
    if chinese:
        words = [
            (COLORS_ZH[product.body], keep),
            (PATTERNS_ZH[product.pattern], keep),
            (EMBLEMS_ZH[product.emblem] + "图案", keep),
            (product.silhouette.name_zh, max(keep, 0.85)),
        ]
        return "".join(word for word, chance in words if rng.random() < chance) or "这一件"
    words = [
        (product.body, keep),
        (product.pattern, keep),
        (product.silhouette.name, max(keep, 0.85)),
        (f"with {product.emblem} print", keep),
    ]
    return " ".join(word for word, chance in words if rng.random() < chance) or "this one"


def draw_title(product: Product, rng: random.Random) -> str:
    """The shop's title of a product: one line without tabs, two thirds Chinese, most attributes named."""
    chinese = rng.random() < 0.67
    extra = rng.sample(_SHOP_WORDS_ZH if chinese else _SHOP_WORDS_EN, rng.randint(1, 3))
    name = _phrase(product, chinese, rng, keep=0.9)
    return f"【{extra[0]}】{name}{''.join(extra[1:])}" if chinese else " ".join([name, *extra])


def _garble(sentence: str, rng: random.Random, rate: float = 0.04) -> str:
    """Drop or double characters as a speech recogniser on a noisy line would."""
    out = []
    for character in sentence:
        draw = rng.random()
        out.append("" if draw < rate else character * 2 if draw > 1 - rate / 3 else character)
    return "".join(out)


def draw_asr(product: Product, others: list[Product], rng: random.Random, garbled: bool = True) -> str:
    """The speech recognition result of a clip: small talk with about half of the attributes, sometimes another product
    of the shop, sometimes "". With `garbled=False` it is the spoken text without recognition errors."""
    if rng.random() < 0.08:
        return ""
    chinese = rng.random() < 0.67
    sentences = rng.sample(_SPEECH_ZH if chinese else _SPEECH_EN, rng.randint(2, 4))
    sentences.insert(rng.randrange(len(sentences) + 1), _phrase(product, chinese, rng, keep=0.5))
    if others and rng.random() < 0.3:
        sentences.insert(rng.randrange(len(sentences) + 1), _phrase(rng.choice(others), chinese, rng, keep=0.5))
    said = ("" if chinese else " ").join(sentences)
    return _garble(said, rng).strip() if garbled else said
