"""Texts that are nearly the same, by TF-IDF of character n-grams (scikit-learn)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

_BETWEEN = re.compile(r"\W+")


def nearest(texts: Sequence[str], among: Sequence[str]) -> list[tuple[int, float]]:
    """Of every text, which of `among` is most alike, and the cosine of the two (1 for the same letters).

    Case and punctuation do not count. Vectors are of the 3 to 5 letters that stand together within words.
    """
    if not texts or not among:
        return []
    mine, others = ([_BETWEEN.sub(" ", text) for text in some] for some in (texts, among))
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit([*mine, *others])
    found = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors.transform(others))
    distance, place = found.kneighbors(vectors.transform(mine))
    return [(int(i[0]), 1 - float(d[0])) for i, d in zip(place, distance, strict=True)]
