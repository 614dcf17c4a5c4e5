"""Rows of several training seeds, and the files of a leaderboard: what is read back, ranked and refused."""

import dataclasses
import json
import re

import pytest
from commands import called
from hypothesis import given
from hypothesis import strategies as st
from toy_runs import write_run

from amt import __main__ as program
from amt.attacks.kinds import Attack
from amt.evaluation import leaderboard, runs, seeds
from amt.evaluation.comparison import compare
from amt.evaluation.statistics import over_seeds
from amt.report.document import page
from meta_dataset_readers.errors import InputError

PGD = (Attack("pgd", (1, 2, 4, 8)),)
COLUMNS = ("clean", *PGD[0].columns)


def amt(*words):
    return called(program.main, ["amt", *words])


@pytest.fixture
def make(tmp_path):
    """`make(name, strength, seeds)` writes a run for each training seed; the word that names them."""

    def write(name: str, strength: float = 0.5, of=(0, 1, 2), **how) -> str:
        folders = [tmp_path / f"{name}-{place}" for place in range(len(of))]
        for seed, folder in zip(of, folders, strict=True):
            write_run(folder, strength=strength, seed=seed, samples=0, episodes=6, **{"attacks": PGD, **how})
        return f"{name}={','.join(map(str, folders))}"

    return write


def written(tmp_path, word: str, name: str, *flags):
    """The file of a row."""
    out = tmp_path / "results" / f"{name}.json"
    ended = amt("row", word, "--name", name, "--out", out, *flags)
    assert ended.code == 0, ended.err
    return out


# --- rows of several seeds -------------------------------------------------------------------------------


def test_a_row_is_the_mean_over_its_seeds_and_domains(make):
    row = seeds.read_row(make("ours"))
    parts = row.seeds
    assert len(parts) == 3 and not row.same_episodes and row.summary("average", "clean").n == 3 * 3 * 6
    for name, members in {"average": row.sources, "digits": ("digits",)}.items():
        expected = over_seeds(
            [{s: [100 * each["pgd20@4"] for each in part.rows[s]] for s in members} for part in parts]
        )
        assert row.summary(name, "pgd20@4") == expected
        means = [part.summary(name, "pgd20@4").mean for part in parts]
        assert expected.mean == pytest.approx(sum(means) / 3)


def test_differences_of_rows_are_taken_seed_by_seed(make):
    """Whatever the order in which the seeds are named; back and forth they are each other's negative."""
    ours, theirs = make("ours", 0.8), make("theirs", 0.3)
    reverse = ",".join(reversed(theirs.partition("=")[2].split(",")))
    a, b = seeds.read_row(ours), seeds.read_row(f"theirs={reverse}")
    forth, back = compare(a, b).differences, compare(b, a).differences
    for key, found in forth.items():
        assert found.mean == pytest.approx(-back[key].mean)
        assert found.mean == pytest.approx(a.summary(*key).mean - b.summary(*key).mean)
        assert found.interval == pytest.approx(back[key].interval)
    assert all(each.mean == each.interval == 0 for each in compare(a, a).differences.values())
    ended = amt("compare", ours, theirs)
    assert ended.code == 0 and len(re.findall("by training seed: clean [+-]", ended.out)) == 1


def test_with_one_seed_it_is_said_what_the_interval_does_not_know(make):
    ours, theirs = make("ours", 0.8, (0,)), make("theirs", 0.3, (0,))
    ended = amt("compare", ours, theirs)
    assert ended.code == 0 and seeds.ONE_SEED in ended.out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split": "VALID"}, "its split is VALID, not TEST"),
        ({"attacks": (Attack("pgd", (8,)),)}, "its attacks differ"),
        ({"domains": ("digits",)}, "its sources is digits"),
        ({"seed": 0}, "of one --seed or of different ones, found 0 1 0"),
    ],
)
def test_what_is_no_other_seed_is_one_line(make, tmp_path, change, named):
    first = make("ours", of=(0, 1))
    write_run(tmp_path / "other", **{"samples": 0, "episodes": 6, "attacks": PGD, "seed": 2, **change})
    ended = amt("compare", f"{first},{tmp_path / 'other'}", first)
    assert ended.code == 2 and named in ended.err and ended.err.count("\n") == 1


@pytest.mark.parametrize("word", ["a=", "=,", ","])
def test_a_row_without_runs_is_one_line(word):
    ended = amt("compare", word, word)
    assert ended.code == 2 and "expected RUN, or NAME=RUN,RUN" in ended.err


def test_other_numbers_of_seeds_are_not_compared(make):
    found = compare(seeds.read_row(make("ours")), seeds.read_row(make("theirs", of=(0,))))
    assert found.differences == {} and found.refusals == ("it has 3 training seeds, not 1",)


def test_a_page_shows_a_row_of_seeds_chance_and_what_is_below_it(make):
    rows = [seeds.read_row(make("ours")), seeds.read_row(make("theirs", 0.0))]
    low = rows[1].summary("digits", "pgd20@8").mean
    assert low < 20 == rows[1].chance("digits")
    text = page(rows)
    assert f"{low:.1f}&lt;" in text and text.count("marks an accuracy that is not above chance") == 1
    assert ">chance</button>" in text and "Dashed: chance" in text and "seed 0, 1, 2" in text
    assert "not above chance" not in page([seeds.read_row(make("strong", 1.0))])


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [(0, 1, 2), (3, 3, 3)])
def test_a_file_gives_back_what_was_measured(make, tmp_path, of):
    """Counts of right answers lose nothing; the same runs give the same bytes."""
    word = make("ours", of=of)
    out = written(tmp_path, word, "ours", "--tuned_on", "the rate on VALID", "--candidates", 3)
    row, known = seeds.read_row(word), leaderboard.read(out)
    for key in [(name, column) for name in ("average", *row.sources) for column in row.columns]:
        assert known.summary(*key) == pytest.approx(row.summary(*key))
    assert (known.about["tuned_on"], known.about["candidates"]) == ("the rate on VALID", 3)
    assert out.stat().st_size < 40 * 3 * 3 * 6 * len(COLUMNS)
    before = out.read_bytes()
    assert written(tmp_path, word, "ours", "--tuned_on", "the rate on VALID", "--candidates", 3) == out
    assert out.read_bytes() == before


def test_files_become_one_ranked_page(make, tmp_path):
    """Best first, paired with the best, stamps and what was tuned beside them; rows of
    other sampling are ranked apart."""
    strong = written(tmp_path, make("strong", 0.9), "strong")
    weak = written(tmp_path, make("weak", 0.1, stamp="chosen with labels"), "weak", "--tuned_on", "a grid")
    other = written(tmp_path, make("one shot", 0.5, sampling={"ways": 5, "support": 1}), "one shot")
    out = tmp_path / "page.html"
    ended = amt("report", weak, other, strong, "--out", out, "--figures", tmp_path / "figures")
    assert ended.code == 0, ended.err
    text = out.read_text()
    first = text[text.index("Ranking: ") :]
    assert first.index("strong") < first.index("weak") and text.count('aria-label="Ranking: ') == 4
    assert "from strong" in text and "a grid" in text and "chosen with labels" in text and "seeds: " in text
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["plane.pdf", "plane.png"]


def changed(text: str, *path, to) -> str:
    found = json.loads(text)
    *way, last = path
    inner = found
    for step in way:
        inner = inner[step]
    inner[last] = to
    return json.dumps(found)


DIGITS = ("seeds", 0, "domains", "digits")


def moved(text: str, move) -> str:
    """The file with what it says of the episodes of one domain, for its first seed, moved list by list."""
    found = json.loads(text)
    domain = found["seeds"][0]["domains"]["digits"]
    domain["right"] = {column: move(values) for column, values in domain["right"].items()}
    domain["index"] = move(domain["index"])
    return json.dumps(found)


def test_seeds_of_the_same_episodes_are_paired_whatever_their_order(make, tmp_path):
    """Those that all have count; without any there is no such row."""
    out = written(tmp_path, make("ours", of=(0, 0)), "ours")
    before, text = leaderboard.read(out), out.read_text()
    out.write_text(moved(text, lambda values: values[::-1]))
    assert leaderboard.read(out).summary("digits", "pgd20@4") == before.summary("digits", "pgd20@4")
    assert before.summary("digits", "pgd20@4").n == 2 * 6
    out.write_text(moved(text, lambda values: values[:4]))
    assert leaderboard.read(out).summary("digits", "pgd20@4").n == 2 * 4
    out.write_text(moved(text, lambda values: [value + 6 for value in values]))
    ended = amt("report", out, "--out", tmp_path / "page.html")
    assert ended.code == 2 and "no episode of digits is finished by all of its runs" in ended.err


def test_differences_without_an_episode_of_all_seeds_are_refused(make):
    """Each pair of runs shares one, and all of them none."""
    ours, theirs = (seeds.read_row(make(name, of=(0, 0))) for name in ("ours", "theirs"))

    def cut(row, *kept):
        parts = [
            dataclasses.replace(part, rows={s: [rows[k] for k in some] for s, rows in part.rows.items()})
            for part, some in zip(row.parts, kept, strict=True)
        ]
        return seeds.joined(parts, "cut")

    found = compare(cut(ours, (0, 1), (0, 2)), cut(theirs, (1, 3), (2, 3)))
    assert found.differences == {} and len(found.refusals) == 3
    assert found.refusals[0].startswith("they share no episode of")


@pytest.mark.parametrize(
    ("path", "to", "named"),
    [
        (("protocol",), 2, "its protocol is 2, expected 1"),
        (("protocol",), "1", "field 'protocol': expected an integer"),
        (("name",), "", "field 'name'"),
        (("seeds",), [], "field 'seeds'"),
        (("attacks",), [{"kind": "magic"}], "field 'attacks.0.epsilons' is missing"),
        (("attacks",), [{"kind": "magic", "epsilons": [1]}], "field 'attacks.0': expected an attack"),
        (("attacks", 0, "steps"), "x", "field 'attacks.0.steps"),
        (("averages",), {"average": ["nowhere"]}, "field 'averages.average'"),
        (("columns",), ["pgd20@4"], "expected clean"),
        (("candidates",), 0, "field 'candidates'"),
        ((*DIGITS, "index"), [0], "one an episode"),
        ((*DIGITS, "index"), [0] * 6, "an episode is there twice"),
        ((*DIGITS, "right", "clean"), [51] * 6, "more right answers than 50 queries"),
        ((*DIGITS, "right", "clean"), [-1] * 6, "domains.digits.right.clean.0"),
        ((*DIGITS, "right"), {}, "'clean' has 0 values, expected 6"),
        ((*DIGITS, "ways"), [5], "'ways' has 1 values"),
        (("seeds", 0, "domains"), {}, "field 'domains'"),
    ],
)
def test_a_damaged_file_is_one_line(make, tmp_path, path, to, named):
    out = written(tmp_path, make("ours", of=(0,)), "ours")
    out.write_text(changed(out.read_text(), *path, to=to))
    ended = amt("report", out, "--out", tmp_path / "page.html")
    assert ended.code == 2 and named in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@given(st.binary(max_size=40) | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps))
def test_whatever_a_file_holds_it_is_one_line(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("rows") / "row.json"
    path.write_bytes(found if isinstance(found, bytes) else found.encode())
    with pytest.raises(InputError, match=re.escape(str(path))):
        leaderboard.read(path)


def test_runs_and_files_are_not_mixed_and_unfinished_runs_are_no_row(make, tmp_path):
    word = make("ours", of=(0,), finished=False)
    file = written(tmp_path, word, "ours")
    ended = amt("report", file, tmp_path / "ours-0", "--out", tmp_path / "page.html")
    assert ended.code == 2 and "expected either runs, or the .json of rows" in ended.err
    lines = (tmp_path / "ours-0" / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ours-0" / "rows.jsonl").write_text("".join(lines[:-1]))
    ended = amt("row", word, "--name", "ours", "--out", tmp_path / "other.json")
    assert ended.code == 2 and "is unfinished" in ended.err and not (tmp_path / "other.json").exists()
    assert runs.load(tmp_path / "ours-0").rows
