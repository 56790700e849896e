"""The page in a browser: the numbers that it shows are those of the tensors, and nothing goes wrong on its console."""

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpt import tokenizer
from gpt.gaze import Gaze, observe
from gpt.model import GPT, ModelConfig, init_weights
from gpt.page import html, printable

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(NAMES)}")
HOSTILE = "</script><script>document.title='obeyed'</script><img src=x onerror=alert(1)> \u202e ünï & 床前明月光\n\n"
NUMBER = r"-?\d+(?:\.\d+)?(?:e-\d+)?"


class Page(HTMLParser):
    """Text of the elements with an id, and the cells of the tables in them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.open: list[tuple[str, str | None]] = []
        self.cell = False
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("meta", "input", "img"):
            return
        self.open.append((tag, dict(attrs).get("id")))
        for name in filter(None, (name for _, name in self.open)):
            if tag == "tr":
                self.rows.setdefault(name, []).append([])
            elif tag in ("td", "th"):
                self.rows[name][-1].append("")
        self.cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        if any(opened == tag for opened, _ in self.open):
            while self.open.pop()[0] != tag:
                pass
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        for name in filter(None, (name for _, name in self.open)):
            self.text[name] = self.text.get(name, "") + data
            if self.cell:
                self.rows[name][-1][-1] += data


@pytest.fixture(scope="module")
def browse(tmp_path_factory) -> Callable[[Path, str], Page]:
    """browse(file, address after the #): the page as the browser has drawn it; anything on its console is a failure."""
    profile = tmp_path_factory.mktemp("profile")

    def visit(file: Path, address: str = "") -> Page:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        logged = ["--enable-logging=stderr", "--virtual-time-budget=20000", "--timeout=60000", "--dump-dom"]
        command = [str(BROWSER), *flags, *logged, f"{file.as_uri()}#{address}"]
        result = subprocess.run(command, capture_output=True, timeout=120)
        console = [line for line in result.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
        assert console == []
        return Page(result.stdout.decode())

    return visit


def gazing(n_tokens: int, text: str, **settings: object) -> Gaze:
    words = tokenizer.train([text * 3], "bpe", 280)
    small = {"max_seq_len": 1024, "n_layer": 2, "d_model": 32, "n_head": 4, "n_kv_head": 2, "init_std": 0.3}
    model = GPT(ModelConfig(**{"vocab_size": words.padded_size, **small, **settings})).eval()
    init_weights(model, seed=1)
    ids = [words.start_id, *words.encode(text * (1 + 2 * n_tokens // len(text)))][:n_tokens]
    n_prefix = 5 if model.config.prefix_lm else 0
    return Gaze(f"attention of {HOSTILE}", model, words, observe(model, ids, n_prefix), 1, 2, [])


def written(shown: Gaze, path: Path) -> Path:
    path.write_bytes(b"".join(html(shown.title, shown.as_page())))
    return path


def check_cell(shown: Gaze, page: Page, layer: int, head: int, query: int, key: int) -> None:
    about, seen = shown.seen.layers[layer], shown.seen
    score, weight = about.scores(head)[query, key].item(), about.weights(head)[query, key].item()
    said = page.text["cell"]
    assert page.text["which"] == f"layer {layer}, head {head}"
    assert said.startswith(f'query {query} "{printable(shown.tokenizer.piece(seen.ids[query]))}" → key {key} "')
    assert float(re.search(rf"score ({NUMBER})", said)[1]) == pytest.approx(score, abs=1e-4)
    if about.visible[query, key]:
        assert float(re.search(rf"softmax ({NUMBER})$", said)[1]) == pytest.approx(weight, abs=1e-4)
    else:
        assert said.endswith("hidden by the mask, softmax 0")


def check_row(shown: Gaze, page: Page, layer: int, head: int, query: int) -> None:
    """The table of a query's keys."""
    about = shown.seen.layers[layer]
    scores, weights = about.scores(head)[query], about.weights(head)[query]
    rows = page.rows["row"][1:]
    assert len(rows) >= min(shown.seen.n_tokens, 2)
    at = page.rows["row"][0].index("softmax")
    for row in rows:
        key = int(row[0])
        assert row[1] == f'"{printable(shown.tokenizer.piece(shown.seen.ids[key]))}"'
        assert float(row[2]) == pytest.approx(scores[key].item(), abs=1e-4)
        if about.visible[query, key]:
            assert float(row[at]) == pytest.approx(weights[key].item(), abs=1e-4)
        else:
            assert row[at] == "hidden"


def check_next(shown: Gaze, page: Page, query: int) -> None:
    """The true next token and its ten rivals, and the table of all positions."""
    after, T = shown.seen.next, shown.seen.n_tokens
    rows = {int(row[1]): (float(row[2]), float(row[3])) for row in page.rows["rivals"][1:]}
    rivals = zip(after.rivals[query].tolist(), after.rival_logprobs[query].tolist(), strict=True)
    expected = dict(rivals) | ({shown.seen.ids[query + 1]: after.logprobs[query].item()} if query + 1 < T else {})
    assert rows.keys() == expected.keys()
    for token, logprob in expected.items():
        assert rows[token][1] == pytest.approx(logprob, abs=1e-4)
        assert rows[token][0] == pytest.approx(2.718281828459045**logprob, abs=1e-4)
    if query + 1 < T:
        said = page.text["expected"]
        assert float(re.search(rf" logit ({NUMBER})", said)[1]) == pytest.approx(after.logits[query].item(), abs=1e-4)
        assert said.endswith(f"rank {int(after.ranks[query])}")


@pytest.mark.parametrize(
    "settings",
    [{}, {"position": "relative", "window": 4}, {"position": "sinusoidal", "prefix_lm": True}, {"position": "none"}],
    ids=["rotary", "bias and window", "sinusoidal and prefix", "no positions"],
)
def test_the_numbers_on_a_small_page_are_those_of_the_tensors(settings, browse, tmp_path):
    shown = gazing(14, HOSTILE, **settings)
    file = written(shown, tmp_path / "page.html")
    for layer, head, query, key in [(0, 3, 9, 2), (1, 0, 3, 6)]:
        page = browse(file, f"layer={layer}&head={head}&query={query}&key={key}&code=1")
        check_cell(shown, page, layer, head, query, key)
        check_row(shown, page, layer, head, query)
        check_next(shown, page, query)
        check_code(shown, page, query, key)
    assert page.tags.count("script") == 2 and "img" not in page.tags


def check_code(shown: Gaze, page: Page, query: int, key: int) -> None:
    """The second row of the codes of position, at the chosen position or distance."""
    kind = shown.codes()["kind"]
    if kind == "none":
        assert "code" not in page.text
        return
    numbers = [float(x) for x in re.findall(rf"(?<=[ :]){NUMBER}(?= |,|$)", page.text["code"])]
    if kind == "angles":
        cos, sin = (table[query, 1].item() for table in shown.seen.angles)
        assert numbers[-2:] == pytest.approx([cos, sin], abs=1e-4)
    elif kind == "codes":
        assert numbers[-1] == pytest.approx(shown.seen.codes[query, 1].item(), abs=1e-4)
    else:
        assert numbers[-1] == pytest.approx(shown.seen.layers[0].bias[1, max(query - key, 0), 0].item(), abs=1e-4)


def test_the_numbers_on_a_page_of_a_thousand_tokens_are_those_of_the_tensors(browse, tmp_path):
    shown = gazing(1000, "the river runs to the sea, and 床前明月光.\n", window=700)
    file = written(shown, tmp_path / "page.html")
    assert shown.seen.n_tokens == 1000 and file.stat().st_size < 4 << 20
    for layer, head, query, key in [(0, 1, 998, 300), (1, 3, 517, 400)]:
        page = browse(file, f"layer={layer}&head={head}&query={query}&key={key}")
        check_cell(shown, page, layer, head, query, key)
        check_row(shown, page, layer, head, query)
        check_next(shown, page, query)
        listed = [int(row[0]) for row in page.rows["row"][1:]]
        weights = shown.seen.layers[layer].weights(head)[query]
        assert key in listed and set(weights.topk(8).indices.tolist()) <= set(listed)


def test_what_goes_wrong_in_a_page_is_seen(browse, tmp_path):
    shown = gazing(5, HOSTILE)
    page = b"".join(html("a page", shown.as_page()))
    (tmp_path / "broken.html").write_bytes(page.replace(b'"masks":[', b'"masks":null,"others":['))
    with pytest.raises(AssertionError, match="Uncaught TypeError"):
        browse(tmp_path / "broken.html")
    (tmp_path / "other.html").write_bytes(page.replace(b'"use strict";', b'"use strict" ;'))
    with pytest.raises(AssertionError, match="Executing inline script violates"):
        browse(tmp_path / "other.html")
