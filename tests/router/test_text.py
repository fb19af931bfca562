"""From tokens to text: stop strings across token borders, endings, what is held back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.request import FinishReason, TokenLogprobs, TokenRow
from router.text import ChoiceText, Piece, StopMatcher, TextOptions
from router.tokenizer import Tokenizer
from tests.router.tiny import EOS_ID, byte_id, byte_ids


def rows(token_ids: list[int], last: FinishReason | None = None) -> list[TokenRow]:
    """Make the rows of a placement."""
    ends = [None] * (len(token_ids) - 1) + [last]
    return [TokenRow(1, 0, i, t, end) for i, (t, end) in enumerate(zip(token_ids, ends, strict=True))]


def run(tokenizer: Tokenizer, options: TextOptions, stream: list[TokenRow]) -> list[Piece]:
    """Feed rows until the choice is over."""
    text, pieces = ChoiceText(tokenizer, options), []
    for row in stream:
        pieces.append(text.feed(row))
        if text.is_over:
            break
    return pieces


def whole(pieces: list[Piece]) -> Piece:
    """Join pieces."""
    found = Piece()
    for piece in pieces:
        found.add(piece)
    return found


def test_a_stop_string_across_tokens_is_never_shown(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, TextOptions(stops=("END",)), rows(byte_ids("abENcENDxyz")))
    assert [p.text for p in pieces] == ["a", "b", "", "", "ENc", "", "", ""]
    last = pieces[-1]
    assert last.finish_reason is FinishReason.STOP and last.stop_reason == "END"
    assert whole(pieces).text == "abENc" and len(whole(pieces).token_ids) == 8


def test_the_stop_string_may_be_kept(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, TextOptions(stops=("ND",), include_stop=True), rows(byte_ids("aENDx")))
    assert whole(pieces).text == "aEND"


def test_what_was_held_back_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, TextOptions(stops=("END",)), rows(byte_ids("xEN"), FinishReason.LENGTH))
    assert whole(pieces) == Piece("xEN", byte_ids("xEN"), [], FinishReason.LENGTH, None)


def test_the_stop_that_is_complete_first_counts(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, TextOptions(stops=("bcd", "c")), rows(byte_ids("abcd")))
    assert (whole(pieces).text, pieces[-1].stop_reason) == ("ab", "c")


def test_stops_count_only_after_min_tokens(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, TextOptions(stops=("a",), min_tokens=3), rows(byte_ids("aaabab")))
    assert whole(pieces).text == "aaab" and len(pieces) == 5


def test_the_ending_token_is_not_shown_and_eos_is_no_stop_reason(tokenizer: Tokenizer) -> None:
    shown = TextOptions(skip_special=False)
    pieces = run(tokenizer, shown, rows([byte_id("a"), EOS_ID], FinishReason.STOP))
    assert whole(pieces) == Piece("a", [byte_id("a"), EOS_ID], [], FinishReason.STOP, None)


def test_a_stop_token_is_the_reason_and_is_shown_only_on_request(tokenizer: Tokenizer) -> None:
    stream = rows(byte_ids("ab"), FinishReason.STOP)
    options = TextOptions(stop_token_ids=frozenset({byte_id("b")}))
    assert whole(run(tokenizer, options, stream)).text == "a"
    assert run(tokenizer, options, stream)[-1].stop_reason == byte_id("b")
    kept = TextOptions(stop_token_ids=frozenset({byte_id("b")}), include_stop=True)
    assert whole(run(tokenizer, kept, stream)).text == "ab"


def test_emoji_come_whole_and_a_broken_one_at_the_end_once(tokenizer: Tokenizer) -> None:
    pieces = run(tokenizer, TextOptions(), rows(byte_ids("a🚀b"), FinishReason.LENGTH))
    assert [p.text for p in pieces] == ["a", "", "", "", "🚀", "b"]
    cut = run(tokenizer, TextOptions(), rows(byte_ids("a🚀")[:3], FinishReason.LENGTH))
    assert [p.text for p in cut] == ["a", "", "\ufffd"]


def test_logprobs_travel_with_their_token(tokenizer: Tokenizer) -> None:
    logprobs = TokenLogprobs(-0.5, ((7, -0.5),), 1)
    piece = ChoiceText(tokenizer, TextOptions()).feed(TokenRow(1, 0, 0, byte_id("a"), None, logprobs))
    assert [(e.token_id, e.logprobs) for e in piece.logged] == [(byte_id("a"), logprobs)]


def _expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Say where a text ends: before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        hit = [(text.find(s, 0, end), s) for s in stops if text[:end].endswith(s)]
        if hit:
            stop = max((s for _, s in hit), key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_the_result_does_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher, shown, at = StopMatcher(stops), "", 0
    while at < len(text) and matcher.matched is None:
        size = data.draw(st.integers(1, 5))
        shown += matcher.feed(text[at : at + size])
        at += size
        assert all(stop not in shown for stop in stops)
    if matcher.matched is None:
        shown += matcher.flush()
    assert (shown, matcher.matched) == _expected(text, stops)
