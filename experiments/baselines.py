"""What needs no model: baselines that a judge has to beat, and how well raters agree among themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from real_fast.evaluation.metrics import correlations

Row = dict[str, Any]
Matrix = NDArray[np.float64]
_ALPHAS = np.logspace(-1, 3, 9)


def predictions(train: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[float]]:
    """The baselines' predictions of `rows`, each fitted on `train` alone, by name.

    "mean_label": the training rows' mean label. "length" and "overlap" are straight lines through one number: the
    logarithm of the response's words, and the share of words that the response has in common with the reference answer
    (the instruction where there is none). "tfidf_ridge" is a ridge regression on the words and pairs of words of the
    response and of what it is compared with, their cosine, and these two numbers; its penalty is chosen by leaving rows
    of `train` out.
    """
    labels = np.array([row["score"] for row in train], dtype=np.float64)
    made: dict[str, list[float]] = {"mean_label": [float(labels.mean())] * len(rows)}
    for name, number in {"length": length, "overlap": overlap}.items():
        line = LinearRegression().fit(_column(train, number), labels)
        made[name] = [float(v) for v in line.predict(_column(rows, number))]
    features = Features(train)
    ridge = RidgeCV(alphas=_ALPHAS).fit(features.of(train), labels)
    made["tfidf_ridge"] = [float(v) for v in ridge.predict(features.of(rows))]
    return made


class Features:
    """Rows as vectors for the ridge regression; words are those of the training rows."""

    def __init__(self, train: Sequence[Row]) -> None:
        self.words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        self.words.fit([row["response"] for row in train] + [other(row) for row in train])
        self.numbers = make_pipeline(StandardScaler()).fit(self._numbers(train))

    def of(self, rows: Sequence[Row]) -> csr_matrix:
        """[rows, features]."""
        response, compared = self._texts(rows)
        return hstack([response, compared, csr_matrix(self.numbers.transform(self._numbers(rows)))]).tocsr()

    def _texts(self, rows: Sequence[Row]) -> tuple[csr_matrix, csr_matrix]:
        return self.words.transform([r["response"] for r in rows]), self.words.transform([other(r) for r in rows])

    def _numbers(self, rows: Sequence[Row]) -> Matrix:
        response, compared = self._texts(rows)
        cosine = np.asarray(response.multiply(compared).sum(axis=1))
        return np.hstack([cosine, _column(rows, length), _column(rows, overlap)])


def length(row: Row) -> float:
    """Logarithm of one more than the response's words."""
    return math.log1p(len(row["response"].split()))


def overlap(row: Row) -> float:
    """Words in both the response and what it is compared with, as a share of those in either (Jaccard)."""
    a, b = ({word.strip(".,;:!?()\"'") for word in text.casefold().split()} for text in (row["response"], other(row)))
    return len(a & b) / len(a | b) if a | b else 0.0


def other(row: Row) -> str:
    """What a response is compared with: the reference answer, or the instruction where there is none."""
    return str(row.get("reference_answer") or row["instruction"])


def raters(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How well each rater agrees with the mean of the others; None where no row has several raters' scores.

    Returns:
        ``raters``, ``n`` and ``pearson``: the mean over raters of the correlation.
    """
    scores = [row["scores"] for row in rows if len(row.get("scores") or []) > 1]
    if not scores or len({len(some) for some in scores}) > 1:
        return None
    table = np.array(scores, dtype=np.float64)
    each = [
        correlations(table[:, i], np.delete(table, i, axis=1).mean(axis=1))["pearson"] for i in range(table.shape[1])
    ]
    known = [value for value in each if value is not None]
    return {"raters": table.shape[1], "n": len(scores), "pearson": sum(known) / len(known) if known else None}


def _column(rows: Sequence[Row], number: Callable[[Row], float]) -> Matrix:
    return np.array([[number(row)] for row in rows], dtype=np.float64)
