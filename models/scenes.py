"""Pictures of coloured shapes, with questions and answers, made from seeds.

A scene holds one to five shapes on a 3 x 3 grid. Colours, sizes, positions and backgrounds vary; no two shapes of a
scene share both colour and shape; a shape's centre lies well inside its cell of the grid. So every question has one
right answer, and the picture shows it. Everything comes from ``random.Random(seed)`` and is drawn with integers, row by
row: a seed gives the same bytes on every machine.

Training and held-out pictures are disjoint by construction. Training seeds are even and held-out seeds odd, and each
seed is drawn from until the picture itself belongs to that split: a picture is held out where the first byte of the
SHA-256 of its pixels is below 32 (one picture in eight), and a training picture otherwise. No picture is both.

>>> from models.scenes import examples
>>> for example in examples("held-out", 2):
...     print(example.question, "->", example.answer)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from math import isqrt
from random import Random

from PIL import Image, ImageDraw

SIZE = 64  # pixels, height and width
SPLITS = ("train", "held-out")
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (235, 205, 45),
    "green": (40, 160, 70),
    "cyan": (60, 205, 215),
    "blue": (45, 80, 225),
    "purple": (155, 50, 180),
}
SHAPES = {  # half the width of the row dy below the centre, in a shape of 2 r + 1 rows
    "circle": lambda r, dy: isqrt(r * r + r - dy * dy),
    "square": lambda r, dy: r,
    "triangle": lambda r, dy: (r + dy) // 2,
    "cross": lambda r, dy: r if abs(dy) <= r // 3 else r // 3,
}
LABELS = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))
PLACES = {  # (row, column) in the grid
    (0, 0): "in the top left corner",
    (0, 1): "above the centre",
    (0, 2): "in the top right corner",
    (1, 0): "left of the centre",
    (1, 1): "in the centre",
    (1, 2): "right of the centre",
    (2, 0): "in the bottom left corner",
    (2, 1): "below the centre",
    (2, 2): "in the bottom right corner",
}
CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2))
QUESTIONS = {
    "count": (
        "how many shapes?",
        "how many shapes are there?",
        "how many shapes are in the picture?",
        "how many coloured shapes do you see in this picture?",
    ),
    "count colour": (
        "how many {} shapes?",
        "how many shapes are {}?",
        "how many {} shapes are there?",
        "how many of the shapes in the picture are {}?",
    ),
    "corner": (
        "what is {}?",
        "what do you see {}?",
        "which shape is {} of the picture?",
    ),
    "colour": (
        "what colour is the {}?",
        "which colour has the {}?",
        "what is the colour of the {}?",
    ),
    "is there": (
        "is there a {}?",
        "do you see a {}?",
        "is there a {} in the picture?",
        "can you see a {} somewhere in this picture?",
    ),
    "where": (
        "where is the {}?",
        "where do you see the {}?",
        "where in the picture is the {}?",
    ),
    "describe": (
        "describe the picture.",
        "what do you see?",
        "what is in the picture?",
        "name every shape in the picture, row by row.",
    ),
    "left or right": (
        "is the {} left or right of the {}?",
        "is the {} on the left or right of the {}?",
    ),
}
KINDS = tuple(QUESTIONS)


@dataclass(frozen=True)
class Example:
    """A picture (RGB, 64 x 64), a question, its one right answer, and the kind of the question."""

    image: Image.Image
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Thing:
    """A coloured shape in a cell (row, column) of the grid."""

    colour: str
    shape: str
    cell: tuple[int, int]

    def __str__(self):
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture and the one to five things in it, in reading order."""

    image: Image.Image
    things: tuple[Thing, ...]

    def kinds(self) -> tuple[str, ...]:
        """The kinds of question it can answer: all, but "left or right" only where things are in two columns."""
        columns = {thing.cell[1] for thing in self.things}
        return tuple(kind for kind in KINDS if kind != "left or right" or len(columns) > 1)

    def ask(self, kind: str, random: Random) -> Example:
        """Draw a question of one of its `kinds`."""
        slots, answer = getattr(self, "_" + kind.replace(" ", "_"))(random)
        return Example(self.image, random.choice(QUESTIONS[kind]).format(*slots), answer, kind)

    def _name(self, thing, random):
        """Its shape alone where that is enough and a coin says so, else colour and shape."""
        unique = [other.shape for other in self.things].count(thing.shape) == 1
        return thing.shape if unique and random.random() < 0.5 else str(thing)

    def _count(self, random):
        return (), str(len(self.things))

    def _count_colour(self, random):
        colours = [thing.colour for thing in self.things]
        colour = random.choice(colours if random.random() < 0.75 else list(COLOURS))
        return (colour,), str(colours.count(colour))

    def _corner(self, random):
        held = {thing.cell: f"a {thing}" for thing in self.things if thing.cell in CORNERS}
        cell = random.choice(list(held) if held and random.random() < 0.75 else CORNERS)
        return (PLACES[cell],), held.get(cell, "nothing")

    def _colour(self, random):
        thing = random.choice(self.things)
        name = self._name(thing, random)
        return (name if name == thing.shape else f"shape {PLACES[thing.cell]}",), thing.colour

    def _is_there(self, random):
        here = {str(thing) for thing in self.things}
        if random.random() < 0.5:
            return (random.choice(sorted(here)),), "yes"
        like = random.choice(self.things)  # half of what is absent shares its colour or its shape
        absent = [label for label in LABELS if label not in here]
        alike = [label for label in absent if like.colour in label or like.shape in label]
        return (random.choice(random.choice((absent, alike))),), "no"

    def _where(self, random):
        thing = random.choice(self.things)
        return (self._name(thing, random),), PLACES[thing.cell]

    def _describe(self, random):
        *most, last = (f"a {thing}" for thing in self.things)
        return (), f"{', '.join(most)} and {last}" if most else last

    def _left_or_right(self, random):
        pairs = [(a, b) for a, b in product(self.things, repeat=2) if a.cell[1] != b.cell[1]]
        a, b = random.choice(pairs)
        return (self._name(a, random), self._name(b, random)), "left" if a.cell[1] < b.cell[1] else "right"


@dataclass(frozen=True)
class ShapePicture:
    """A picture of one shape and the index of its name in `LABELS`."""

    image: Image.Image
    label: int


def scene(seed: int, kind: str | None = None) -> Scene:
    """Make the scene of a seed: an even one gives a training picture, an odd one a held-out picture.

    With `kind`, the first scene from that seed that can answer a question of this kind.
    """

    def draw(random):
        # Two or three colours a scene, so that counting one colour is more than finding it.
        labels = list(product(random.sample(list(COLOURS), random.choice((2, 3))), SHAPES))
        count = random.randint(1, 5)
        things = [
            Thing(colour, shape, cell)
            for (colour, shape), cell in zip(
                random.sample(labels, count), sorted(random.sample(list(PLACES), count)), strict=True
            )
        ]
        canvas = _background(random)
        for thing in things:
            radius = random.randint(5, 8)
            x, y = (11 + 21 * i + random.randint(-2, 2) for i in reversed(thing.cell))
            _paint(canvas, thing.colour, thing.shape, x, y, radius, random)
        return Scene(canvas, tuple(things))

    return _of_split(seed, draw, lambda drawn: kind is None or kind in drawn.kinds())


def examples(split: str, count: int, start: int = 0) -> Iterator[Example]:
    """Make examples `start` to `start + count - 1` of a split, one question a picture, the kinds in turn.

    Parameters
    ----------
    split : {"train", "held-out"}
    count, start : int
        How many, and the number of the first: example i is the same whatever the two are.
    """
    for number in range(start, start + count):
        seed, kind = _seed(split, number), KINDS[number % len(KINDS)]
        yield scene(seed, kind).ask(kind, Random(f"question {seed}"))


def shape_examples(split: str, count: int, start: int = 0) -> Iterator[tuple[Image.Image, int]]:
    """Make pictures of one shape, anywhere and of any size, each with the index of its name in `LABELS`."""

    def draw(random):
        label = random.randrange(len(LABELS))
        canvas, radius = _background(random), random.randint(6, 24)
        x, y = (random.randint(radius + 1, SIZE - radius - 2) for _ in "xy")
        _paint(canvas, *LABELS[label].split(), x, y, radius, random)
        return ShapePicture(canvas, label)

    for number in range(start, start + count):
        drawn = _of_split(_seed(split, number), draw)
        yield drawn.image, drawn.label


def _seed(split: str, number: int) -> int:
    if split not in SPLITS:
        raise ValueError(f"no split is called {split!r}; the splits are {' and '.join(SPLITS)}")
    return 2 * number + SPLITS.index(split)


def _of_split(seed: int, draw: Callable, wanted: Callable = lambda drawn: True):
    """Draw from a seed until the drawing is wanted and its picture belongs to the seed's split."""
    random = Random(seed)
    while True:
        drawn = draw(random)
        held_out = sha256(drawn.image.tobytes()).digest()[0] < 32
        if held_out == seed % 2 and wanted(drawn):
            return drawn


def _background(random: Random) -> Image.Image:
    """Light or dark, lightly tinted, fading from top to bottom."""
    low, high = random.choice(((0, 45), (205, 255)))
    top, bottom = ([random.randint(low, high) for _ in "rgb"] for _ in range(2))
    image = Image.new("RGB", (SIZE, SIZE))
    pen = ImageDraw.Draw(image)
    for y in range(SIZE):
        shade = tuple((a * (SIZE - 1 - y) + b * y) // (SIZE - 1) for a, b in zip(top, bottom, strict=True))
        pen.rectangle((0, y, SIZE - 1, y), fill=shade)
    return image


def _paint(canvas: Image.Image, colour: str, shape: str, x: int, y: int, radius: int, random: Random) -> None:
    """Draw a shape around (x, y) in a shade of its colour."""
    shade = tuple(min(255, max(0, value + random.randint(-15, 15))) for value in COLOURS[colour])
    pen = ImageDraw.Draw(canvas)
    for dy in range(-radius, radius + 1):
        half = SHAPES[shape](radius, dy)
        pen.rectangle((x - half, y + dy, x + half, y + dy), fill=shade)
