import pytest

from gpt.census import script_of


@pytest.mark.parametrize(
    ("data", "script"),
    [
        (" the", "Latin"),
        ("床前", "Han"),
        ("かな", "kana"),
        ("мир", "Cyrillic"),
        ("123", "digits"),
        ("\n\t", "space"),
        ("(x, y)", "punctuation"),
        ("ไทย", "other"),
    ],
)
def test_a_token_has_the_script_of_most_of_it(data: str, script: str) -> None:
    assert script_of(data.encode()) == script
    assert script_of("床".encode()[:2]) == "parts of characters"
