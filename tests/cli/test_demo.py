"""The demo: reading ratings, histories without leakage, the split, and a short run of it all."""

from __future__ import annotations

import copy
import itertools
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="the extra [demo] is not installed")
pytest.importorskip("sklearn", reason="the extra [demo] is not installed")

from seqkernels.__main__ import main
from seqkernels.demo import data, measure, results, training
from seqkernels.demo.examples import LENGTH, MOVING, Examples, prepare, split_by_time
from seqkernels.demo.model import ranker
from seqkernels.models import EngagementRanker, stock_twin
from seqkernels.precision import FEWEST_WEIGHTS

Event = tuple[int, int, int, int]  # user, item, rating, time


def generated(users: int = 40, items: int = 30, ratings: int = 1500, seed: int = 0) -> list[Event]:
    """Ratings of users who like even items and of users who like odd ones, in random order.

    Some users have more events than a history holds, and timestamps repeat.
    """
    random = np.random.default_rng(seed)
    user = np.minimum(random.geometric(0.08, ratings), users)
    item = random.integers(1, items + 1, ratings)
    likes = (user + item) % 2 == 0
    rating = np.clip(np.where(likes, 5, 2) - (random.random(ratings) < 0.3), 1, 5)
    time = 880_000_000 + random.integers(0, ratings // 3, ratings) * 60
    return list(zip(user.tolist(), item.tolist(), rating.tolist(), time.tolist(), strict=True))


def as_u_data(events: list[Event]) -> str:
    return "".join("\t".join(map(str, event)) + "\n" for event in events)


def as_inter(events: list[Event]) -> str:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    return header + as_u_data(events)


def ratings_of(events: list[Event]) -> data.Ratings:
    return data.parse(as_u_data(events))


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [as_u_data, as_inter])
def test_both_formats_give_the_ratings(written: Callable[[list[Event]], str]) -> None:
    events = [(196, 242, 3, 881250949), (22, 242, 5, 878887116), (196, 7, 4, 881250949)]
    ratings = data.parse(written(events))
    assert len(ratings) == 3
    assert (ratings.num_users, ratings.num_items) == (2, 2)
    assert ratings.user[0] == ratings.user[2] != ratings.user[1]
    assert ratings.item[0] == ratings.item[1] != ratings.item[2]
    assert ratings.rating.tolist() == [3, 5, 4]
    assert ratings.time.tolist() == [881250949, 878887116, 881250949]
    assert ratings.liked.tolist() == [False, True, True]


def test_inter_columns_are_found_by_name() -> None:
    text = "timestamp:float\tweight:float\titem_id:token\tuser_id:token\trating:float\n"
    ratings = data.parse(text + "10\t0.5\tfilm\tanna\t4.5\n20\t0.5\tother\tanna\t1\n\n")
    assert ratings.time.tolist() == [10, 20]
    assert ratings.rating.tolist() == [4.5, 1]
    assert ratings.num_users == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no ratings"),
        ("user_id:token\titem_id:token\trating:float\n1\t2\t3\n", "no column timestamp"),
        ("1\t2\t3\t4\n1,2,3,4\n", "line 2: expected 4 columns"),
        ("1\t2\tgood\t4\n", "column rating"),
        ("1\t2\t3\tnan\n", "column timestamp: expected finite"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, message: str) -> None:
    with pytest.raises(data.DataError, match=message):
        data.parse(text, "file")


def test_own_copy_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "ml-100k.zip"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(data.DataError, match="expected text"):
        data.load(path)
    with pytest.raises(data.DataError, match="No such file"):
        data.load(tmp_path / "absent")


def test_ratings_are_read_out_of_a_wheel_in_the_cache(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", as_inter(generated()))
    assert len(data.download(tmp_path)) == 1500


def test_damaged_download_is_named(tmp_path: Path) -> None:
    (tmp_path / "recbole-1.2.1-py3-none-any.whl").write_bytes(b"half a file")
    with pytest.raises(data.DataError, match=r"damaged.*delete it"):
        data.download(tmp_path)


def test_failed_download_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_PACKAGE", "not/a-package==0")  # pip refuses it without a network
    with pytest.raises(data.DataError, match="--data FILE"):
        data.download(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# --- histories ------------------------------------------------------------------------------------


def histories(events: list[Event]) -> list[list[tuple[int, int]]]:
    """By the definition: for each event the (item, rating) of the user's strictly earlier ones.

    Latest first; among equal timestamps the later line of the file counts as the later event.
    """
    found = []
    for user, _, _, time in events:
        earlier = [
            (t, line, item, rating)
            for line, (u, item, rating, t) in enumerate(events)
            if u == user and t < time
        ]
        latest_first = sorted(earlier, reverse=True)[:LENGTH]
        found.append([(item, rating) for _, _, item, rating in latest_first])
    return found


def check_histories(events: list[Event]) -> None:
    """Decode every example and compare it with the definition."""
    ratings = ratings_of(events)
    examples = Examples(ratings)
    assert len(examples) == len(events)
    # Examples are sorted by user, then time, then line.
    order = np.lexsort((np.arange(len(events)), ratings.time, ratings.user))
    batch = examples.batch(np.arange(len(events)))
    item_names = np.unique([str(e[1]) for e in events]).astype(int)
    rating_values = np.unique([e[2] for e in events])
    expected = histories(events)
    for row, line in enumerate(order):
        length = int(batch.lengths[row])
        assert length == len(expected[line])
        decoded = [
            (int(item_names[item - 2]), int(rating_values[action - 1]))
            for item, action in zip(
                batch.items[row, :length].tolist(),
                batch.actions[row, :length].tolist(),
                strict=True,
            )
        ]
        assert decoded == expected[line]
        assert not batch.items[row, length:].any()
        assert not batch.actions[row, length:].any()
        assert item_names[int(batch.candidate[row]) - 2] == events[line][1]
        assert bool(examples.liked[row]) == (events[line][2] >= 4)


event = st.tuples(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(0, 12)
)  # many share a user and a timestamp


@given(st.lists(event, min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_histories_are_what_the_definition_says(events: list[Event]) -> None:
    check_histories(events)


def test_long_histories_keep_the_latest_events() -> None:
    events = generated(users=4, ratings=500)
    assert max(map(len, histories(events))) == LENGTH
    check_histories(events)


def changed_from(events: list[Event], time: int) -> list[Event]:
    """The same events with other items and ratings from a moment on, and the same users."""
    return [(u, 1 + i % 9, 6 - r, t) if t >= time else (u, i, r, t) for u, i, r, t in events]


@given(st.lists(event, min_size=2, max_size=40), st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_nothing_from_its_own_moment_on_enters_an_example(events: list[Event], time: int) -> None:
    # Every item and rating occurs in both, so that numbers mean the same.
    frame: list[Event] = [(9, i, r, -1) for i in range(1, 10) for r in range(1, 6)]
    before = Examples(ratings_of(frame + events))
    after = Examples(ratings_of(frame + changed_from(events, time)))
    rows = np.flatnonzero(before.time == time)
    for name, one, other in zip(
        measure.Batch._fields, before.batch(rows), after.batch(rows), strict=True
    ):
        if name != "candidate":  # that is the event itself
            assert torch.equal(one, other), name


def test_features_by_hand() -> None:
    events = [(1, 1, 5, 100), (1, 2, 1, 100), (1, 3, 4, 160)]
    examples = Examples(ratings_of(events), like_rate=0.6)
    features = examples.batch(np.arange(3)).features.numpy()
    first = [0.0, 4 * 0.6 - 2, 0.0, 0.0]
    last = [np.log1p(2), 4 * (1 + 5 * 0.6) / (2 + 5) - 2, 0.1 * np.log1p(60), 0.0]
    np.testing.assert_array_equal(features, np.array([first, first, last], dtype=np.float32))


def test_items_that_training_does_not_know_are_one() -> None:
    events = [(1, item, 4, time) for time, item in enumerate([1, 2, 3, 4])]
    examples = Examples(ratings_of(events), known_items=np.array([1, 3]))
    batch = examples.batch(np.array([3]))
    assert batch.candidate.tolist() == [3]
    assert batch.items[0, :3].tolist() == [1, 2, 1]
    assert examples.num_items == 4


# --- the split ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 200), min_size=30, max_size=200))
@settings(deadline=None)
def test_split_is_by_time(times: list[int]) -> None:
    time = np.array(times, dtype=float)
    try:
        split = split_by_time(time)
    except data.DataError:
        assert len(np.unique(time)) < len(time)  # without ties it always works
        return
    parts = (split.train, split.validation, split.test)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(time)))
    for earlier, later in itertools.pairwise(parts):
        assert time[earlier].max() < time[later].min()


def test_split_shares() -> None:
    split = split_by_time(np.arange(1000.0))
    assert [len(split.train), len(split.validation), len(split.test)] == [800, 100, 100]


def test_too_little_to_split() -> None:
    with pytest.raises(data.DataError, match="too few"):
        split_by_time(np.zeros(50))


def test_the_training_set_knows_nothing_of_later_ratings() -> None:
    events = generated()
    examples, split = prepare(ratings_of(events))
    end = examples.time[split.train].max()
    changed = [(u, i % 30 + 1, 6 - r, t) if t > end else (u, i, r, t) for u, i, r, t in events]
    again, split_again = prepare(ratings_of(changed))
    assert np.array_equal(split.train, split_again.train)
    assert np.array_equal(examples.liked[split.train], again.liked[split.train])
    assert not np.array_equal(examples.liked[split.test], again.liked[split.test])
    for one, other in zip(examples.batch(split.train), again.batch(split.train), strict=True):
        assert torch.equal(one, other)


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[Examples, EngagementRanker]:
    examples, _ = prepare(ratings_of(generated()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ranker(examples)
        for table in (model.action, model.item):
            torch.nn.init.normal_(table.weight)  # events that differ
    return examples, model.eval()


@pytest.fixture(scope="module")
def small_fp64(small: tuple[Examples, EngagementRanker]) -> tuple[Examples, EngagementRanker]:
    """In fp64, of which the log-odds keep a float32: other paths to one function give the same."""
    examples, model = small
    return examples, copy.deepcopy(model).double()


def test_the_stock_twin_computes_the_same(
    small_fp64: tuple[Examples, EngagementRanker],
) -> None:
    examples, model = small_fp64
    rows = np.argsort(examples.lengths, kind="stable")[:: len(examples) // 40]
    assert examples.lengths[rows].min() == 0
    assert examples.lengths[rows].max() == LENGTH
    work = [examples.batch(rows)]
    ours, stock = (torch.from_numpy(measure.log_odds(m, work)) for m in (model, stock_twin(model)))
    torch.testing.assert_close(ours, stock)


def test_amount_of_padding_does_not_matter(small_fp64: tuple[Examples, EngagementRanker]) -> None:
    examples, model = small_fp64
    rows = np.flatnonzero(examples.lengths <= 3)[:20]
    short = measure.log_odds(model, [examples.batch(rows, 3)])
    long = measure.log_odds(model, [examples.batch(rows, LENGTH)])
    torch.testing.assert_close(torch.from_numpy(short), torch.from_numpy(long))


def test_one_user_with_many_candidates_is_that_user_many_times(
    small: tuple[Examples, EngagementRanker],
) -> None:
    examples, model = small
    row = np.flatnonzero(examples.lengths > 10)[:1]
    candidates = torch.arange(1, 20)
    one = examples.batch(row).for_candidates(candidates)
    many = examples.batch(row.repeat(19)).for_candidates(candidates)
    exact = copy.deepcopy(model).double()  # in bf16 the shared part is rounded elsewhere
    alone, repeated = (torch.from_numpy(measure.log_odds(exact, [b])) for b in (one, many))
    torch.testing.assert_close(alone, repeated)


def test_training_is_reproducible_and_stops_in_time(
    small: tuple[Examples, EngagementRanker],
) -> None:
    examples, _ = small
    rows = np.arange(600)

    def trained(seconds: float) -> tuple[EngagementRanker, training.Training]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = ranker(examples)
        done = training.train(model, examples, rows, epochs=2, seconds=seconds, seed=1)
        return model, done

    (first, done), (second, _) = trained(1e9), trained(1e9)
    assert done.steps == done.planned_steps == 6
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trained(0.0)[1].steps == 1


# --- results --------------------------------------------------------------------------------------


def measured(key: str, scores: list[float], seconds: float) -> measure.Variant:
    variant = measure.Variant(key, key, torch.nn.Identity(), encoder={"torch"})
    variant.scores = np.array(scores)
    variant.test_seconds = [seconds, 2 * seconds, 3 * seconds]
    variant.request_seconds = [seconds] * 10
    variant.request_scores = np.arange(40.0).reshape(2, 20)
    variant.moved_scores = 1.0 - variant.scores
    variant.normed, variant.moved_normed = 2.0, 316.0 if key.startswith("stock") else 10.0
    return variant


def test_figures_by_hand() -> None:
    liked = np.array([False, True, False, True])
    stock = measured("stock_fp32", [0.1, 0.4, 0.35, 0.8], 3.0)
    swapped = measured("swapped", [0.1, 0.3, 0.35, 0.8], 1.0)
    swapped.request_scores = swapped.request_scores.copy()
    swapped.request_scores[0, 19] = -1  # the best of the first request is lost
    found, verdict = results.figures([stock, swapped], liked)
    assert found["stock_fp32"]["auc"] == 1.0
    assert found["swapped"]["auc"] == 0.75
    assert found["swapped"]["auc_change"] == -0.25
    assert found["swapped"]["score_change_max"] == pytest.approx(0.1)
    assert found["swapped"]["score_change_mean"] == pytest.approx(0.025)
    assert found["swapped"]["top10_kept"] == pytest.approx(0.95)
    assert found["swapped"]["log_loss"] == pytest.approx(
        -np.log([0.9, 0.3, 0.65, 0.8]).mean(), rel=1e-9
    )
    assert found["stock_fp32"]["test_set_seconds"] == 6.0
    assert verdict["speedup_test_set_seconds"]["stock_fp32"] == 3.0
    assert found["swapped"]["log_loss_change"] == pytest.approx(-np.log(0.3 / 0.4) / 4, rel=1e-9)
    assert found["stock_fp32"]["moved"]["auc"] == 0.0
    assert found["stock_fp32"]["moved"]["normed"] == 316.0
    assert verdict["within_bar"] is False
    text = results.summary(found, verdict)
    assert "NOT as good as before" in text
    assert "turns it into 316 standard deviations and the AUC goes from 1.000 to 0.000" in text
    assert "the resilient one stays within 10.0" in text
    assert "within 0.0002: no" in text
    assert "3.0 times as fast as stock_fp32" in text


def test_summary_is_honest_when_slower() -> None:
    liked = np.array([False, True])
    variants = [measured("stock_fp32", [0.1, 0.4], 1.0), measured("swapped", [0.1, 0.4], 2.0)]
    text = results.summary(*results.figures(variants, liked))
    assert "slower, in 2.0 times the time of stock_fp32" in text
    assert "The fused kernel did not run here" in text
    assert "within 0.0002: yes" in text


# --- all of it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "u.data").write_text(as_u_data(generated()))
    arguments = ["demo", "--data", "u.data", "--json", "out/results.json", "--plot", "out/plot.png"]
    arguments += ["--requests", "3", "--epochs", "2", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(measure, "CANDIDATES", 30)
        assert main(arguments) == 0
    return json.loads((folder / "out/results.json").read_text()), folder


def test_run_writes_what_it_measured(outcome: tuple[dict[str, Any], Path]) -> None:
    whole, folder = outcome
    assert list(whole["results"]) == ["stock_fp32", "stock_bf16", "swapped"]
    for found in whole["results"].values():
        assert 0.0 <= found["auc"] <= 1.0
        assert found["log_loss"] > 0.0
        assert found["test_set_seconds"] > 0.0
        assert len(found["request_ms_all"]) == 3
        assert found["request_ms_p50"] <= found["request_ms_p99"]
    assert whole["machine"]["torch"] == torch.__version__
    assert whole["machine"]["threads"] == 1
    assert {"processor", "isa", "commit"} <= set(whole["machine"])
    assert whole["data"]["ratings"] == 1500
    assert whole["data"]["train"]["last_time"] < whole["data"]["test"]["first_time"]
    assert whole["training"]["steps"] == whole["training"]["planned_steps"]
    assert (folder / "out/plot.png").read_bytes().startswith(b"\x89PNG")


def test_run_swaps_and_keeps_the_scores(outcome: tuple[dict[str, Any], Path]) -> None:
    whole, _ = outcome
    stock, swapped = (whole["results"][key] for key in ("stock_fp32", "swapped"))
    assert stock["encoder"] == ["torch"]
    if whole["machine"]["isa"] is None:
        assert whole["swap"]["skipped"]
        assert swapped["auc_change"] == 0.0
        return
    isa, replaced = whole["machine"]["isa"], {r["name"] for r in whole["swap"]["replaced"]}
    assert "mlp" in replaced
    assert ("mlp.0" in replaced) == ((isa, torch.float32) in FEWEST_WEIGHTS)
    assert swapped["encoder"] == [f"cpu/{isa}"]
    # Of 150 examples one pair in a thousand may change places without any being a mistake, so the
    # scores are what is held here; bf16 has 8 bits.
    assert 0.0 < swapped["score_change_max"] < 2.0**-6
    changes = (swapped["auc_change"], swapped["log_loss_change"])
    assert whole["verdict"]["within_bar"] == (max(map(abs, changes)) <= 0.0002)


def test_a_feature_that_moves_explodes_stock_and_not_ours(
    small: tuple[Examples, EngagementRanker],
) -> None:
    """As after long training: the running variance of what never varied has come to nothing."""
    examples, model = small
    model = copy.deepcopy(model)
    model.dense_norm.running_var[MOVING] = 0.0
    work = [examples.batch(np.arange(50))]
    variants = [measure.Variant("stock", "", stock_twin(model)), measure.Variant("ours", "", model)]
    measure.measure_moved_feature(variants, work)
    stock, ours = variants
    assert stock.normed == pytest.approx(ours.normed)
    assert stock.moved_normed == pytest.approx(1e-5**-0.5)
    assert ours.moved_normed == model.config.max_abs
    before = measure.probabilities(measure.log_odds(model, work))
    assert np.abs(stock.moved_scores - before).mean() > np.abs(ours.moved_scores - before).mean()


def test_moving_the_feature_changes_it_alone(small: tuple[Examples, EngagementRanker]) -> None:
    examples, _ = small
    batch = examples.batch(np.arange(50))
    moved = batch.from_new_clients()
    assert (batch.features[:, MOVING] == 0).all()
    assert (moved.features[:, MOVING] == 1).all()
    assert torch.equal(moved.features[:, :MOVING], batch.features[:, :MOVING])
    for name in ("actions", "items", "lengths", "candidate"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))


def test_probabilities_of_huge_log_odds() -> None:
    with np.errstate(all="raise", under="ignore"):
        found = measure.probabilities(np.array([-1e6, -1.0, 0.0, 1e6]))
    assert found.tolist() == [0.0, pytest.approx(1 / (1 + np.e)), 0.5, 1.0]


def test_run_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--data", str(tmp_path / "absent.inter")]) == 1
    said = capsys.readouterr()
    assert "absent.inter" in said.err
    assert "research" in said.out
    assert "Harper" in said.out


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--requests", "0"])
    assert "--requests: expected a whole number above 0, got '0'" in capsys.readouterr().err


def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("session", "results", "show"):
        monkeypatch.delitem(sys.modules, f"seqkernels.demo.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert main(["demo"]) == 2
    assert "pip install 'seqkernels[demo]'" in capsys.readouterr().err
