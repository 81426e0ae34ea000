"""Which picture a row names, in whatever field, and what is named and not there."""

from typing import Any

import pytest

from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason
from stic_ray.method.media import address_of, named_image, without_placeholder

TEXTS = ("id", "question")
NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": "a.jpg"}, "a.jpg"),
        ({"image": ["a.jpg"]}, "a.jpg"),
        ({"images": ["a.jpg"]}, "a.jpg"),
        ({"images": "a.jpg"}, "a.jpg"),
        ({"image": None, "images": ["a.jpg", None]}, "a.jpg"),
        ({"image": "a.jpg", "images": ["a.jpg"]}, "a.jpg"),
        ({"image": {"bytes": None, "path": "a.jpg"}}, {"bytes": None, "path": "a.jpg"}),
        ({"image": "a.jpg", "image_id": 7, "file_name": "a.jpg", "video_id": "x", "has_audio": True}, "a.jpg"),
        ({"image": "a.jpg", "image_1": "a.jpg", "image_2": None}, "a.jpg"),
        ({}, None),
        ({"image": None}, None),
        ({"image": NAN}, None),
        ({"image": ""}, None),
        ({"image": []}, None),
        ({"images": [None]}, None),
        ({"image": {"bytes": None, "path": None}}, None),
        ({"img": None, "video": NAN, "num_images": 0, "has_image": False}, None),
        ({"id": "000.jpg", "question": "What does a.png mean?", "source": "a set of texts", "format": "jpg"}, None),
    ],
)
def test_the_image_of_a_row(row: dict[str, Any], expected: Any) -> None:
    assert named_image(row, TEXTS) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        *(({name: "x"}, Reason.NO_IMAGE) for name in ("img", "picture", "photo", "Image", "image_path", "images_path")),
        *(({name: "x"}, Reason.NO_IMAGE) for name in ("imagePath", "image_url", "imgs", "image_id", "image1")),
        *(({name: "a/b.JPG"}, Reason.NO_IMAGE) for name in ("file_name", "path", "source", "url")),
        ({"url": "https://example.org/a.png?size=large"}, Reason.NO_IMAGE),
        ({"num_images": 1}, Reason.NO_IMAGE),
        ({"content": [{"src": "data:image/png;base64,iVBORw0KGgo="}]}, Reason.NO_IMAGE),
        *(
            ({"base64": f"{head}{'Ab+/' * 2000}"}, Reason.NO_IMAGE)
            for head in ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
        ),
        ({"metadata": {"origin": {"img": "x"}}}, Reason.NO_IMAGE),
        ({"files": ["a.txt", "b.png"]}, Reason.NO_IMAGE),
        ({"image": ["a.jpg", "b.jpg"]}, Reason.SEVERAL_IMAGES),
        ({"image": "a.jpg", "images": ["b.jpg"]}, Reason.SEVERAL_IMAGES),
        ({"image": "a.jpg", "image_2": "b.jpg"}, Reason.SEVERAL_IMAGES),
        ({"video": "a.mp4"}, Reason.VIDEO),
        ({"videos": ["a.mp4"]}, Reason.VIDEO),
        ({"video_path": "a"}, Reason.VIDEO),
        ({"clip": "a.webm"}, Reason.VIDEO),
        ({"image": "a.jpg", "video": "a.mp4"}, Reason.VIDEO),
        ({"audio": "a"}, Reason.AUDIO),
        ({"recording": "a.wav"}, Reason.AUDIO),
    ],
)
def test_what_a_row_names_and_cannot_be_shown_is_rejected(row: dict[str, Any], expected: Reason) -> None:
    with pytest.raises(Rejected) as caught:
        named_image(row, TEXTS)
    assert caught.value.reason is expected


@pytest.mark.parametrize("image", [5, {"url": "a.jpg"}, "data:image/png;base64,AAAA", "x" * 5000, "a\0b", ["a.jpg"]])
def test_an_image_that_is_no_address_is_rejected_in_a_short_line(image: Any) -> None:
    with pytest.raises(Rejected, match="not the path of a file") as caught:
        address_of(image)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "\nWhat?"),
        ("a <image> b <image>", "a  b "),
        ("<im<image>age>", ""),
        ("<im<im<image>age>age>x", "x"),
        ("<image", "<image"),
        ("<imag<image>e><image>", ""),
    ],
)
def test_placeholders_are_removed_until_none_is_left(text: str, expected: str) -> None:
    assert without_placeholder(text) == expected


def test_placeholders_inside_each_other_take_linear_time() -> None:
    assert without_placeholder("<im" * 100_000 + "<image>" + "age>" * 100_000) == ""
