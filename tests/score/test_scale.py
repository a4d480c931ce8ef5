from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from real_fast.errors import ScaleError
from real_fast.score.scale import ScoreScale, format_score

PHRASE = "So the overall score is "
TEXT = "The response follows the rubric. So the overall score is"


def word_tokenizer(extra, merges_space=False, sentencepiece=False):
    """A tokenizer whose words are single tokens; digits are characters unless `extra` or a merge says otherwise."""
    mark = "▁" if sentencepiece else "Ġ"
    letters = sorted({c for c in TEXT + "0123456789.=:-" if c != " "})
    vocabulary = {token: i for i, token in enumerate([mark, *letters])}
    merges = []

    def merge(a, b):
        merges.append((a, b))
        vocabulary.setdefault(a + b, len(vocabulary))

    for word in TEXT.split():
        for piece in [word] if word == "The" else [mark + word]:
            for end in range(1, len(piece)):
                if (piece[:end], piece[end]) not in merges:
                    merge(piece[:end], piece[end])
    for a, b in extra:
        merge(a, b)
    if merges_space:
        for digit in "0123456789":
            merge(mark, digit)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if sentencepiece:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_smollm2_has_bare_digits_after_a_space_token(smollm2_tokenizer):
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], PHRASE)
    assert scale.score_ids == (33, 34, 35, 36, 37)
    assert smollm2_tokenizer.decode(scale.phrase_ids) == " " + PHRASE
    assert smollm2_tokenizer.convert_ids_to_tokens(list(scale.tail_ids)) == ["Ġ"]


@pytest.mark.parametrize("values", [[1, 3, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 1]])
def test_scales_with_gaps_zero_and_any_order(smollm2_tokenizer, values):
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, values, PHRASE)
    assert scale.values == tuple(sorted(values))
    assert scale.score_ids == tuple(32 + v for v in sorted(values))


def test_a_score_of_two_tokens_is_named(smollm2_tokenizer):
    with pytest.raises(ScaleError, match=r"score 10 is 2 tokens \['1', '0'\]"):
        ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 5, 10], PHRASE)
    with pytest.raises(ScaleError, match=r"score 2.5 is 3 tokens"):
        ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2.5], PHRASE)


def test_ten_as_one_token_works():
    scale = ScoreScale.from_tokenizer(word_tokenizer([("1", "0")]), [1, 5, 10], PHRASE)
    assert len(set(scale.score_ids)) == 3


def test_a_tokenizer_that_merges_the_space_is_refused_and_another_phrase_works():
    tokenizer = word_tokenizer([], merges_space=True)
    with pytest.raises(ScaleError, match=r"merges the end of scale\.phrase"):
        ScoreScale.from_tokenizer(tokenizer, [1, 2, 3], PHRASE)
    assert ScoreScale.from_tokenizer(tokenizer, [1, 2, 3], "So the overall score is=").tail_ids == ()


def test_scores_that_share_their_first_token_are_refused(smollm2_tokenizer):
    with pytest.raises(ScaleError, match="common part"):
        ScoreScale.from_tokenizer(smollm2_tokenizer, [10, 11], PHRASE)


def test_sentencepiece_prefix_space():
    """A bare "5" is ['▁', '5'] there: ids of scores encoded alone would be wrong."""
    tokenizer = word_tokenizer([], sentencepiece=True)
    assert len(tokenizer.encode("5", add_special_tokens=False)) == 2
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], PHRASE)
    assert tokenizer.convert_ids_to_tokens(list(scale.score_ids)) == ["1", "2", "3", "4", "5"]
    assert tokenizer.convert_ids_to_tokens(list(scale.phrase_ids))[-2:] == ["▁is", "▁"]


def test_a_phrase_without_its_space_is_refused(smollm2_tokenizer):
    with pytest.raises(ScaleError, match="ends in a letter or digit"):
        ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2], PHRASE.rstrip())


@pytest.mark.parametrize("values", [[], [3], [2, 2]])
def test_too_few_scores(smollm2_tokenizer, values):
    with pytest.raises(ScaleError, match="at least two"):
        ScoreScale.from_tokenizer(smollm2_tokenizer, values, PHRASE)


def test_format_score():
    assert [format_score(v) for v in (1.0, 10, 2.5, 0)] == ["1", "10", "2.5", "0"]


@pytest.mark.parametrize("phrase", [" ", "\n", " \t\u3000"])
def test_a_phrase_of_white_space_alone_is_refused(smollm2_tokenizer, phrase):
    with pytest.raises(ScaleError, match="white space alone"):
        ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3], phrase)
