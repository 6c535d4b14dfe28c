"""Names of classes in a Python dict, as in imagenet1000_clsidx_to_labels.txt."""

import re

import pytest

from training.data.class_names import parse_python_dict, read_class_names

FOLDERS = ["n01440764", "n01443537", "n01484850"]


def test_imagenets_names_are_read(tmp_path):
    """The numbers are those of the sorted folders; the order in the file does not matter."""
    path = tmp_path / "imagenet1000_clsidx_to_labels.txt"
    path.write_text(
        "{0: 'tench, Tinca tinca',\n 2: \"Steller's jay\",\n 1: 'potter\\'s wheel \\u00e9',}\n",
        encoding="utf-8",
    )
    expected = ["tench, Tinca tinca", "potter's wheel é", "Steller's jay"]
    assert read_class_names(path, FOLDERS) == expected
    path.write_text(" 0: 'a',\n 1: 'b',\n 2: 'c'")  # as in GMFlow's repository
    assert read_class_names(path, FOLDERS) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="names 3 classes, but the images are in 2 class folders"):
        read_class_names(path, FOLDERS[:2])
    path.write_text(repr(dict(zip(FOLDERS, "abc", strict=True))))
    assert read_class_names(path, FOLDERS[1:]) == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{0: 'a', 0: 'b'}", "names the class 0 twice"),
        ("{0: __import__('os').system('true')}", 'is no dict of names: "0: __import__'),
        ("{0: 'a' * 10**9}", "is no dict of names"),
        ("{0: {1: 'a'}}", "is no dict of names"),
        ("{0: 'a'} + x", "its } is missing"),
        ("{0: 'a'", "its } is missing"),
        ("{0: '\\ud8'}", "holds a string that cannot be read"),
        ("{" + "'" + "a" * 10**5 + "}", "is no dict of names"),
        ("{0: " + "-" * 10**5 + "1}", "is no dict of names"),
    ],
)
def test_what_is_no_dict_of_names_is_refused(text, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        parse_python_dict(text, tmp_path / "names.txt")
    assert len(str(error.value)) < 1000
