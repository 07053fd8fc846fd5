"""data/run/figures.py, console.py: pictures and tables say what the rows of metrics.jsonl say."""
import hashlib
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data.run import console, figures

ROOT = Path(__file__).resolve().parents[1]
SHOWN = [{"prompt": "Flip a coin.", "split": "train", "responses": {"heads": 0.25, "tails": 0.75}},
         {"prompt": "Pay $5 or $6.", "split": "heldout", "responses": {"$5": 0.5, "$6": 0.5}}]


def rows_of_a_run(iters=2, reports=2, kl=0.5, empirical=False, **changes) -> list[dict]:
    """Rows as train.py writes them, in its order; the numbers are made up, and all differ."""
    rows = []
    for t in range(iters + 1):
        for k in range(1, reports + 1):
            for event in ("step", "iteration") if k == reports else ("step",):
                for split in ("train", "heldout"):
                    far = (reports + 1 - k) / 3 ** t * (1 if split == "train" else 1.5)
                    row = {"event": event, "method": "spin", "iteration": t, "step": k * 10,
                           "split": split, "kl": kl * far, "nll": 1 + far, "off_support": far / 10,
                           "sampled_wrong": far / 40 if t else 0.0, "loss": 0.6 + far / 20,
                           "predicted_kl": kl * far / 3 if t and not empirical else None,
                           "predicted_tv": 0.1 if t and not empirical else None,
                           "loss_floor": 0.6 if t and not empirical else None,
                           "logp_real": -1 - far, "logp_generated": -2 - far if t else None,
                           "margin": far if t else None, "nll_per_token": far / 4,
                           "families": {"coins": kl * far, "pay": far}, "tv": far / 9}
                    if split == "train":
                        row["shown"] = [[0.2 + 0.01 * t, 0.6 - far / 9], [0.4, 0.3 + 0.01 * t]]
                        row["shown_predicted"] = [[0.3, 0.7], [0.45, 0.55]] if t else None
                    rows.append(row | changes)
    return rows


def axes_of(rows, empirical=False, start=math.log(2), shown=SHOWN):
    """The axes of convergence.png."""
    with figures.own_style(13):
        figure = Figure(figsize=(16, 5.2 if empirical else 11), dpi=80)
        FigureCanvasAgg(figure)
        figures.draw_panels(figure, rows, shown, empirical, start)
    return figure.get_axes()


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# --- what may disturb a picture ------------------------------------------------------------------

def test_neither_backend_nor_settings_of_the_user_stop_or_deform_a_picture(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\naxes.facecolor: red\n"
                                           "savefig.bbox: tight\nbackend: TkAgg\n",
                                           encoding="utf-8")
    code = ("import sys, hashlib, test_figures as t; from data.run import figures as f\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"
            "print(hashlib.sha256(f.draw_convergence(t.rows_of_a_run(), t.SHOWN)\n"
            "                     + f.draw_gif(t.rows_of_a_run(), t.SHOWN)).hexdigest())")
    code = "import sys; sys.path.insert(0, 'tests'); from data.run import figures; " + code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"MPLBACKEND": "not-installed",
                                            "MATPLOTLIBRC": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = rows_of_a_run()
    here = figures.draw_convergence(rows, SHOWN) + figures.draw_gif(rows, SHOWN)
    assert done.stdout.split()[-1] == hashlib.sha256(here).hexdigest()


def test_show_without_a_display_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(matplotlib.rcParams, "backend", "agg")
    window = figures.Window()
    window.redraw(rows_of_a_run(), SHOWN)
    assert capsys.readouterr().out.count("\n") == 1


# --- the panels ----------------------------------------------------------------------------------

def test_a_shows_measured_and_predicted_kl():
    rows = rows_of_a_run()
    ax = axes_of(rows)[0]
    for line, split in zip(ax.lines, ("train", "heldout")):
        some = figures.pick(rows, "iteration", split)
        assert [*line.get_xdata()] == [0, 1, 2]
        assert [*line.get_ydata()] == [row["kl"] for row in some]
    marks = [mark.get_segments()[0] for mark in ax.collections]
    assert [mark[:, 0].mean() for mark in marks] == [1, 2], "iterations 1 and 2, not SFT"
    assert [mark[0, 1] for mark in marks] == [
        row["predicted_kl"] for row in figures.pick(rows, "iteration")[1:]]
    assert f"{rows[-2]['predicted_kl']:.3g} at the end" in labels(ax)[2]


@pytest.mark.parametrize("kl", [1e-9, 0.0051, 0.6, 30])
def test_a_log_axis_of_less_than_a_decade_has_numbers(kl):
    ax = axes_of(rows_of_a_run(iters=0, kl=kl))[0]
    low, high = ax.get_ylim()
    assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 2
    assert all(label.get_text() for label in ax.get_yticklabels())


@pytest.mark.parametrize("start", [math.log(2), 1.0, 2 * math.log(2)])
def test_b_shows_the_loss_its_floor_and_the_value_it_starts_from(start):
    rows = rows_of_a_run()
    ax = axes_of(rows, start=start)[1]
    reports = [r["loss"] for r in figures.spin_reports(rows)[0][:2]]
    assert [*ax.lines[0].get_ydata()] == [start, *reports]
    assert [*ax.lines[0].get_xdata()] == [0, 0.5, 1.0]
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(start)
    assert labels(ax)[-1].startswith({1.0: "1:"}.get(start, "log 2:" if start < 1 else "1.39:"))
    assert [mark.get_segments()[0].tolist() for mark in ax.collections] == [
        [[0, 0.6], [1, 0.6]], [[1, 0.6], [2, 0.6]]]


@pytest.mark.parametrize("changes", [{"loss_floor": None}, {"loss_floor": None, "method": "sft"}])
def test_b_names_no_floor_where_there_is_none(changes):
    ax = axes_of(rows_of_a_run(**changes), start=None if "method" in changes else math.log(2))[1]
    assert not ax.collections and not any("floor" in label for label in labels(ax))
    assert any("log 2" in label for label in labels(ax)) == ("method" not in changes)


def test_c_begins_with_p_0_and_its_masses_sum_to_one():
    rows = rows_of_a_run()
    ax = axes_of(rows)[2]
    right, wrong, *parts = [line.get_ydata() for line in ax.lines]
    off_support = [row["off_support"] for row in (figures.pick(rows, "iteration")[0],
                                                  *figures.spin_reports(rows)[0])]
    assert [*wrong] == off_support and [*right] == [1 - share for share in off_support]
    for sampled, others in ((0, 1), (2, 3)):  # the lines of iterations 1 and 2
        total = [a + b for a, b in zip(parts[sampled], parts[others])]
        assert total == pytest.approx(wrong[1 + sampled:3 + sampled])
    assert len(parts) == 4 and len(labels(ax)) == 4 and "leak" in labels(ax)[3]


def test_d_shows_each_policy_and_where_the_theorem_puts_it():
    rows = rows_of_a_run()
    ax = axes_of(rows)[3]
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    policies = [[0.25, 0.75], *(row["shown"][0] for row in figures.pick(rows, "iteration"))]
    assert heights == [pytest.approx([*p, 1 - sum(p)]) for p in policies]
    assert len(ax.collections) == 2, "a mark for p_1 and for p_2, none for SFT"
    for bars, marks in zip(ax.containers[2:], ax.collections):
        segments = marks.get_segments()
        assert [s[0, 1] for s in segments] == pytest.approx([0.3, 0.7, 0])
        for bar, segment in zip(bars, segments):
            assert bar.get_x() < segment[0, 0] < segment[1, 0] < bar.get_x() + bar.get_width()


LONG = [{"prompt": "Name the longest word that you know, please.", "split": "train",
         "responses": {f"{k} 你好, what do you mean?": 0.1 for k in range(8)}}] * 4
LONG_ROW = {"shown": [[0.1] * 8] * 4, "shown_predicted": [[0.12] * 8] * 4}


@pytest.mark.parametrize("rows, empirical, shown", [
    (rows_of_a_run(), False, SHOWN), (rows_of_a_run(empirical=True), True, SHOWN),
    (rows_of_a_run(iters=0), False, SHOWN), (rows_of_a_run(**LONG_ROW), False, LONG),
    (rows_of_a_run(iters=40, kl=1e-6), False, SHOWN), (rows_of_a_run()[:-3], False, SHOWN),
    (rows_of_a_run()[:2], False, SHOWN), (rows_of_a_run(method="sft"), False, SHOWN)])
def test_nothing_is_cut_at_the_edge_of_the_picture(rows, empirical, shown):
    figure = axes_of(rows, empirical, shown=shown)[0].get_figure(root=True)
    assert len(figure.get_axes()) == (3 if empirical else 3 + len(shown))
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 and drawn.x1 <= width and 0 <= drawn.y0 and drawn.y1 <= height, drawn


@pytest.mark.parametrize("empirical", [False, True])
def test_the_moving_picture_has_a_frame_for_each_report(empirical):
    rows = rows_of_a_run(empirical=empirical)
    picture = Image.open(io.BytesIO(figures.draw_gif(rows, SHOWN, empirical)))
    assert picture.n_frames == len(figures.pick(rows, "step")) == 6


def test_prompts_are_drawn_as_they_stand():
    assert figures.legible("a $x$ \x1b[31m\n你 b", 30) == "a $x$ □[31m □ b"
    assert figures.legible("abcdef", 4) == "abc…"
    assert "$5 or $6" in axes_of(rows_of_a_run())[4].get_title()


# --- the console ---------------------------------------------------------------------------------

@pytest.mark.parametrize("empirical", [False, True])
def test_a_progress_line_has_at_most_100_columns(empirical, capsys):
    for row in rows_of_a_run(iters=12, kl=9.5, empirical=empirical):
        found = {"train": row | {"off_support": 1.0}, "heldout": row}
        console.print_progress(row["iteration"], row["step"], 1000, found, 1234, empirical)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_the_closing_table_explains_its_columns(capsys):
    console.print_closing_table(rows_of_a_run(), "out", 3, False, {"train": 9, "heldout": 2})
    text = capsys.readouterr().out
    for words in ("Theorem 5.4", "nats", "9 train prompts", "2 held-out prompts", "p_data‖p_t"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100 and "got worse" not in text


def test_a_column_without_a_value_is_left_out_and_a_turn_is_told(capsys):
    rows = [row for row in rows_of_a_run(predicted_kl=None, predicted_tv=None)
            if row["split"] == "train"]
    rows[-1]["kl"] = 9.0
    console.print_closing_table(rows, "out", 3, False, {"train": 9})
    text = capsys.readouterr().out
    assert "Theorem" not in text and "held" not in text
    assert "Train prompts got worse after iteration 1: KL 0.167 → 9.000." in text


def test_plain_pairs_have_a_table_of_their_own(capsys):
    console.print_closing_table(rows_of_a_run(empirical=True), "out", 3, True,
                                {"train": 9, "heldout": 1})
    text = capsys.readouterr().out
    assert "perplexity" in text and "1 held-out prompt\n" in text and "KL" not in text
