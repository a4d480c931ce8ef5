"""Texts that are nearly the same, by TF-IDF of character n-grams (scikit-learn)."""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors


def nearest(texts: Sequence[str], among: Sequence[str]) -> list[tuple[int, float]]:
    """Of every text, which of `among` is most alike, and the cosine of the two (1 for the same letters).

    Case does not count. Vectors are of the 3 to 5 letters that stand together within words.
    """
    if not texts or not among:
        return []
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    vectors.fit([*texts, *among])
    found = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors.transform(among))
    distance, place = found.kneighbors(vectors.transform(texts))
    return [(int(i[0]), 1 - float(d[0])) for i, d in zip(place, distance, strict=True)]
