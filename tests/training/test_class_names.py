"""Names of classes in Python, as in imagenet1000_clsidx_to_labels.txt."""

import re

import pytest

from training.data.class_names import read_class_names

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
    "text",
    [
        """{"n01440764": 'a', "n01484850": 'c', 'n01443537': "b"}  # one quoted as JSON does""",
        "# by hand\n{0: 'a',  # the first\n 1: 'b', 2: 'c'}\n# end",
        "['a', \"b\", 'c',]",
        "[\n# all\n'a', 'b', 'c']",
        '["a", "b", "c"]',
        '{"0": "a", "1": "b", "2": "c"}',
        "{'0': 'a', '2': 'c', '1': 'b'}",
    ],
)
def test_lists_comments_and_either_quote_are_read(text, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(text)
    assert read_class_names(path, FOLDERS) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{0: 'a', 0: 'b'}", "names the class '0' twice"),
        ("{0: __import__('os').system('true')}", 'dict of names: "0: __import__'),
        ("{0: 'a' * 10**9}", "'* 10**9}' stands in it"),
        ("{0: {1: 'a'}}", "0: {1: 'a'}}"),
        ("{0: 'a'} + x", "'+ x' stands in it"),
        ("{0: 'a'};", "';' stands in it"),
        ("{0: 'a' 'b'}", "\"'b'}\" stands in it"),
        ("['a', 1]", "'1]' stands in it"),
        ("names = ['a']", "\"names = ['a']\" stands in it"),
        ("{0: 'a'", "its } is missing"),
        ('["a", "b"', "its ] is missing"),
        ("0:", "'0:' stands in it"),
        ("{0: '\\ud8'}", "holds a string that cannot be read"),
        ("{" + "'" + "a" * 10**5 + "'}", "dict of names: "),
        ("{0: " + "-" * 10**5 + "1}", "dict of names: "),
        ("[" * 10**5, "'[[[["),
        ("", "names 0 classes but not '0'"),
    ],
)
def test_what_holds_no_names_is_refused(text, said, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_class_names(path, ["a"])
    assert len(str(error.value)) < 1000
