"""What the numbers of GGUF files say: the sentence, the frontier, the page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghostlayers.compare.files import write_report
from ghostlayers.report.page import render_page
from ghostlayers.report.results import read_results
from ghostlayers.report.tables import to_markdown
from ghostlayers.report.types_chart import styles_of, type_panels
from ghostlayers.report.types_table import difference, file_grid, files_of, says

FILE = Path(__file__).parent / "fixtures" / "results.json"
CUT = {"layers": 2, "select": "recoverable", "repair": "refit:1", "removed": "2-3"}
DENSE = {"layers": 0, "select": "", "repair": "dense", "removed": "none"}
SPREAD = {"prefill_spread": 0.01, "decode_spread": 0.01}


def planted(*rows: tuple[Any, str, float, float, float], noise: float = 0.0) -> Any:
    """Results with files: model, type, megabytes, loss, tokens written a second."""
    values = json.loads(FILE.read_text())
    files, losses = [], []
    for number, (name, kind, size, loss, rate) in enumerate(rows):
        rng = np.random.default_rng(number)
        row = {**name, "type": kind}
        windows = (loss + noise * rng.standard_normal(8)).tolist()
        files.append({**row, "size_bytes": round(size * 1e6), "decode_tokens_s": rate,
                      "prefill_tokens_s": 10 * rate, "memory_bytes": round(2e6 * size),
                      "prompt_tokens": 512, "context": 4096, **SPREAD})  # fmt: skip
        losses.append({**row, "corpus": "one", "loss_nats": float(np.mean(windows)),
                       "kl_nats": loss - 3.0, "window_losses": windows})  # fmt: skip
    return read_results({**values, "files": files, "file_losses": losses})


TRADE = (
    (DENSE, "F16", 270.0, 3.00, 50.0),
    (DENSE, "Q8_0", 140.0, 3.01, 80.0),
    (DENSE, "Q4_K_M", 90.0, 3.05, 95.0),
    (CUT, "F16", 210.0, 3.30, 65.0),
    (CUT, "Q8_0", 110.0, 3.31, 100.0),
    (CUT, "Q4_K_M", 80.0, 3.36, 120.0),
)


def test_the_sentence_says_what_wins_at_equal_bytes_and_speed() -> None:
    assert says(files_of(planted(*TRADE))) == (
        "For bytes alone, quantise: 2 cut files lose more than a dense one that is no larger, and "
        "1 cut file is smaller than any dense one (80 MB at least, against 90 MB); at the same "
        "speed, quantise: 1 cut file loses more than a dense one that writes as fast, and 2 cut "
        "files are faster than any dense one (120 tokens a second at most, against 95.0)."
    )


def test_a_cut_that_costs_nothing_wins() -> None:
    said = says(files_of(planted(TRADE[0], (CUT, "F16", 300.0, 2.9, 50.0))))
    assert said == (
        "For bytes alone, cut: 1 cut file loses less than a dense one that is no larger; at the "
        "same speed, cut: 1 cut file loses less than a dense one that writes as fast."
    )


def test_what_differs_by_less_than_its_error_is_equal() -> None:
    close = (TRADE[0], (CUT, "F16", 300.0, 3.01, 50.2))
    assert "neither is always better: 1 cut file loses as much as" in says(
        files_of(planted(*close, noise=0.2))
    )
    assert "quantise: 1 cut file loses more" in says(files_of(planted(*close)))
    # 50.2 tokens a second are within a hundredth of 50.
    assert "at the same speed, quantise" in says(files_of(planted(*close)))


def test_a_difference_is_that_of_the_same_windows() -> None:
    one, other = files_of(planted(*TRADE[:2], noise=0.3))
    a, b = (np.array(each.windows[0]) for each in (one, other))
    apart, error = difference(one, other)
    assert apart == pytest.approx((a - b).mean())
    assert error == pytest.approx((a - b).std(ddof=1) / 8**0.5)


def test_of_each_cut_the_best_repair_is_spoken_of() -> None:
    bare = ({**CUT, "repair": "none"}, "Q8_0", 110.0, 5.0, 100.0)
    assert says(files_of(planted(*TRADE, bare))) == says(files_of(planted(*TRADE)))


def test_nothing_is_said_of_one_side_alone() -> None:
    assert says(files_of(planted(*TRADE[:3]))) == ""
    assert says([]) == ""


def test_the_frontier_holds_what_nothing_beats() -> None:
    files = files_of(planted(*TRADE))
    size, speed = type_panels(files, styles_of(files))
    assert size.note == (
        "On the frontier: 2 layers less (recoverable), refit:1: Q4_K_M; dense: Q4_K_M, Q8_0, F16."
    )
    assert speed.note == (
        "On the frontier: 2 layers less (recoverable), refit:1: Q4_K_M, Q8_0; dense: Q4_K_M, "
        "Q8_0, F16."
    )
    assert "var(--c7)" in size.picture


@pytest.mark.slow
def test_the_page_and_the_tables_show_every_file(tmp_path: Path) -> None:
    results = planted(*TRADE)
    page = render_page(results)
    assert "Cut or quantise" in page
    assert "For bytes alone, quantise" in page
    assert "4,096 tokens" in page
    assert file_grid(results)[1][4] == [
        "2 layers less (recoverable), refit:1", "Q8_0", "110.0", "3.310", "0.310", "0.310",
        "1,000", "100", "220",
    ]  # fmt: skip
    assert "| 2 layers less (recoverable), refit:1 | Q8_0 | 110.0 |" in to_markdown(results)
    written = write_report(results.to_dict(), tmp_path)
    again = read_results(json.loads((tmp_path / "results.json").read_text()))
    assert again.files == results.files
    assert len(written) >= 4


def test_without_files_the_page_is_as_it_was() -> None:
    values = json.loads(FILE.read_text())
    page = render_page(read_results(values))
    assert 'id="types"' not in page
