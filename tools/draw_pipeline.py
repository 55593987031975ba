"""Draw nbs/images/pipeline.svg: the paper's training pipeline (after its Figure 4).

Use: python tools/draw_pipeline.py     (the same input gives the same file, byte for byte)
"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402
from notebooks import NBS  # noqa: E402

COLOUR = "#1f6fb2"
BOXES = {  # name: (centre x, centre y, width, title, small print)
    "text": (0.95, 3.0, 1.5, "raw text", "data_samples/"),
    "tokens": (2.95, 3.0, 1.6, "tokenizer", "Section 2.2"),
    "pretrain": (5.1, 3.0, 1.8, "pretraining", "Sections 2.1, 2.2"),
    "sft": (7.35, 3.0, 1.8, "fine-tuning", "Section 3.1"),
    "chat": (9.6, 3.0, 1.8, "chat model", "make chat"),
    "prefs": (9.6, 1.0, 1.8, "preferences", "Section 3.2.1"),
    "rewards": (7.0, 1.0, 2.5, "two reward models", "helpful and safe: 3.2.2, 4"),
    "reject": (3.95, 1.0, 2.5, "rejection sampling", "Section 3.2.3"),
    "ppo": (1.35, 1.0, 1.6, "PPO", "Section 3.2.3"),
}
ARROWS = [("text", "tokens"), ("tokens", "pretrain"), ("pretrain", "sft"), ("sft", "chat"), ("chat", "prefs"),
          ("prefs", "rewards"), ("rewards", "reject"), ("reject", "ppo")]
HEIGHT = 0.95


def box(ax, x: float, y: float, width: float, title: str, small: str) -> None:
    "A box with two lines of text."
    ax.add_patch(FancyBboxPatch((x - width / 2, y - HEIGHT / 2), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.14",
                                linewidth=1.5, facecolor=COLOUR, edgecolor=COLOUR))
    ax.text(x, y + 0.15, title, ha="center", va="center", fontsize=11, fontweight="bold", color="white")
    ax.text(x, y - 0.22, small, ha="center", va="center", fontsize=8.5, color="white")


def arrow(ax, start: tuple[float, float], end: tuple[float, float]) -> None:
    "An arrow between two points."
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=15, linewidth=1.6, shrinkA=2, shrinkB=2, color=COLOUR))


def between(a: str, b: str) -> tuple[tuple[float, float], tuple[float, float]]:
    "Where the arrow from box `a` to box `b` starts and ends: on the sides that face each other."
    (xa, ya, wa, *_), (xb, yb, wb, *_) = BOXES[a], BOXES[b]
    if xa == xb:
        way = 1 if yb > ya else -1
        return (xa, ya + way * HEIGHT / 2), (xb, yb - way * HEIGHT / 2)
    way = 1 if xb > xa else -1
    return (xa + way * wa / 2, ya), (xb - way * wb / 2, yb)


def draw(path: Path) -> None:
    "Draw the picture on a white card, so that it reads on a dark page as well."
    plt.rcParams.update({"svg.hashsalt": "llama2", "font.family": "DejaVu Sans"})
    fig, ax = plt.subplots(figsize=(10.6, 3.9))
    for spec in BOXES.values():
        box(ax, *spec)
    for a, b in ARROWS:
        arrow(ax, *between(a, b))
    (x, y, *_), (to, top, *_), middle = BOXES["ppo"], BOXES["chat"], 2.0
    ax.plot([x, x, to - 0.5], [y + HEIGHT / 2, middle, middle], color=COLOUR, linewidth=1.6)
    arrow(ax, (to - 0.5, middle - 0.03), (to - 0.5, top - HEIGHT / 2))
    ax.text(5.2, middle, "five rounds: every better model is judged anew (3.4.1)", ha="center", va="center", fontsize=9.5,
            color="#333333", bbox=dict(facecolor="white", edgecolor="none", pad=4))
    ax.set(xlim=(0, 10.7), ylim=(0.3, 3.75))
    ax.set_aspect("equal")
    ax.axis("off")
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, format="svg", facecolor="white", bbox_inches="tight", pad_inches=0.12, metadata={"Date": None, "Creator": None})
    plt.close(fig)


if __name__ == "__main__":
    draw(NBS / "images" / "pipeline.svg")
