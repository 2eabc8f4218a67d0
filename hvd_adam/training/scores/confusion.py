"""The confusion matrix of an evaluation as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

CELL, MARGIN, LINE = 34, 8, 16  # pixels
LONGEST_NAME = 14  # characters
MOST_NUMBERS = 20  # classes; with more, the shades alone are readable


def draw(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> tuple[bytes, int, int]:
    """Draws a confusion matrix; a row's shades are fractions of its class, a cell's number counts images.

    It uses Pillow, because every evaluation draws one and matplotlib is slower.

    Args:
        matrix: number of test images by true class (rows) and predicted class (columns).
        classes: names of the classes.

    Returns:
        The PNG file, and width and height of the picture in pixels.
    """
    from PIL import Image, ImageDraw, ImageFont  # here: only rank 0 of a training needs it

    font = ImageFont.load_default()
    rows = [_row_label(number, name) for number, name in enumerate(classes)]
    left = 2 * MARGIN + max(round(font.getlength(text)) for text in [*rows, "true class"])
    top = 2 * LINE + 2 * MARGIN
    width = max(left + CELL * len(rows), left + 120) + MARGIN
    height = top + CELL * len(rows) + MARGIN
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.text((left, MARGIN), "predicted class", fill="black", font=font)
    pen.text((left - MARGIN, MARGIN), "true class", fill="black", font=font, anchor="ra")
    for number, (row, counts) in enumerate(zip(rows, matrix, strict=True)):
        y = top + CELL * number
        pen.text((left + CELL * number + CELL / 2, top - LINE), str(number), fill="black", font=font, anchor="ma")
        pen.text((left - MARGIN, y + CELL / 2), row, fill="black", font=font, anchor="rm")
        total = max(1, sum(counts))
        for column, count in enumerate(counts):
            x, shade = left + CELL * column, count / total
            color = tuple(round(255 + (end - 255) * shade) for end in (8, 48, 107))
            pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=color, outline="lightgrey")
            if count and len(rows) <= MOST_NUMBERS:
                text_color = "white" if shade > 0.5 else "black"
                pen.text((x + CELL / 2, y + CELL / 2), str(count), fill=text_color, font=font, anchor="mm")
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), width, height


def _row_label(number: int, name: str) -> str:
    """Returns a class's name, in characters that every version of Pillow's built-in font has, and its number."""
    name = name.encode("ascii", "replace").decode()[:LONGEST_NAME]
    return name if name == str(number) else f"{name} ({number})"
