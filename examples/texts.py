"""Text scoring: a TF-IDF classifier, trained on the spot and shipped with the code."""

import re
from typing import Any

import numpy as np

import tierwise

app = tierwise.App("texts")
_WORD = r"[a-z]{3,}"


def train() -> dict[str, Any]:
    """Fit TF-IDF and logistic regression on scikit-learn's own data set descriptions.

    Real English prose that is there offline: which of six data sets does a paragraph describe?

    Returns:
        Vocabulary, inverse document frequencies, coefficients and names, as plain arrays.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts, labels = paragraphs()
    vectorizer = TfidfVectorizer(token_pattern=_WORD, lowercase=True)
    matrix = vectorizer.fit_transform(texts)
    classifier = LogisticRegression(C=30.0, max_iter=500).fit(matrix, labels)
    return {
        "vocabulary": {word: int(index) for word, index in vectorizer.vocabulary_.items()},
        "idf": vectorizer.idf_.astype("float32"),
        "coefficients": classifier.coef_.astype("float32"),
        "intercepts": classifier.intercept_.astype("float32"),
        "names": [str(name) for name in classifier.classes_],
    }


def documents(rng: np.random.Generator, count: int) -> list[str]:
    """Return documents of 60 drawn paragraphs each."""
    texts, _ = paragraphs()
    return ["\n\n".join(rng.choice(texts, size=60)) for _ in range(count)]


def paragraphs() -> tuple[list[str], list[str]]:
    """Return paragraphs of the descriptions, and which data set each is about."""
    from sklearn import datasets

    texts: list[str] = []
    labels: list[str] = []
    for name in ("iris", "wine", "breast_cancer", "diabetes", "digits", "linnerud"):
        description = getattr(datasets, f"load_{name}")().DESCR
        for paragraph in re.split(r"\n\s*\n", description):
            if len(paragraph) > 60:
                texts.append(paragraph)
                labels.append(name)
    return texts, labels


def make_scorer(model: dict[str, Any]) -> Any:
    """Return the function that scores a document with `model`; it needs NumPy only."""

    @app.function(memory="96MiB", deadline="100ms", priority="normal", keep_alive="3s")
    def score_text(document: str) -> list[dict[str, Any]]:
        """Say of every sentence which data set it describes, and how sure that is."""
        import re

        import numpy as np

        found = []
        for sentence in re.split(r"[.;:]\s", document.lower()):
            counts = np.zeros(len(model["idf"]), dtype=np.float32)
            for word in re.findall(r"[a-z]{3,}", sentence):
                index = model["vocabulary"].get(word)
                if index is not None:
                    counts[index] += 1.0
            vector = counts * model["idf"]
            vector /= max(float(np.linalg.norm(vector)), 1e-9)
            logits = model["coefficients"] @ vector + model["intercepts"]
            powers = np.exp(logits - logits.max())
            best = int(powers.argmax())
            found.append({"about": model["names"][best], "p": float(powers[best] / powers.sum())})
        return found

    return score_text
