"""Continual learning, curricula, federated learning, unsupervised pretraining."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.research.continual import AnalyticClassifier, RecursiveRidge
from pyloss.research.curriculum import CurriculumSampler, Pacing, difficulty_scores
from pyloss.research.federated import dirichlet_split, simulate
from pyloss.research.pretrain import (
    PPCA,
    ComponentHead,
    GaussianMixture,
    LeastSquaresHead,
    pretrain_then_erm,
)

X, Y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
MODEL = torch.nn.Linear(3, 3)
CLIENTS, TEST = [(X[:4], Y[:4]), (X[4:], Y[4:])], (X, Y)


def pace(kind="linear", a=0.8, b=0.2, total_steps=10, step=3, n=7):
    return torch.tensor(Pacing(kind, a, b, total_steps)(step, n))


def fit(**options):
    return RecursiveRidge(3, **options).fit_batch(X, Y).W


ROWS = (
    refused(ValueError, "in_features must be >= 1, got 0", RecursiveRidge, 0),
    refused(ValueError, "gamma must be finite and > 0, got 0", RecursiveRidge, 3, 0),
    refused(TypeError, "bias must be a bool, got int", RecursiveRidge, 3, bias=1),
    refused(ValueError, "dtype must be torch.float64 or torch.float32, got torch.float16",
            RecursiveRidge, 3, dtype=torch.float16),
    refused(ValueError, "X must have 4 features, got [6, 3]", RecursiveRidge(4).fit_batch, X, Y),
    refused(ValueError, "X must be (N, D), got [3]", RecursiveRidge(3).fit_batch, X[0], Y[:1]),
    refused(TypeError, "y must hold integers, got torch.float32", RecursiveRidge(3).fit_batch, X,
            Y.float()),
    refused(ValueError, "y must have the shape [6], got [5]", RecursiveRidge(3).fit_batch, X,
            Y[:5]),
    refused(ValueError, "y must have 6 rows, got [5, 2]", RecursiveRidge(3).fit_batch, X,
            torch.zeros(5, 2)),
    refused(IndexError, "y must be >= 0, got -1", RecursiveRidge(3).fit_batch, X, Y - 1),
    refused(RuntimeError, "there are no classes yet: call fit_batch first", RecursiveRidge(3), X),
    refused(ValueError, "input must have 3 features, got [6, 2]",
            RecursiveRidge(3).fit_batch(X, Y), X[:, :2]),
    accepted(fit, gamma=(np.float64(0.5), 0.5), bias=(np.bool_(True), True)),
    refused(TypeError, "backbone must be a Module, got function", AnalyticClassifier,
            pace, 3),
    refused(ValueError, "the backbone's output must have 4 features, got [6, 3]",
            AnalyticClassifier(torch.nn.Identity(), 4, 8).fit_batch, X, Y),
    refused(TypeError, "generator must be a torch.Generator, got int", AnalyticClassifier,
            torch.nn.Identity(), 3, generator=0),
    refused(ValueError, "kind must be one of linear, quad, root, step, exp, log, got 'cosine'",
            Pacing, "cosine"),
    refused(ValueError, "a must be finite and > 0, got 0", Pacing, a=0),
    refused(ValueError, "b must be in (0, 1], got 0.0", Pacing, b=0.0),
    refused(ValueError, "b must be in (0, 1], got 1.5", Pacing, b=1.5),
    refused(ValueError, "total_steps must be >= 1, got 0", Pacing, total_steps=0),
    refused(ValueError, "step must be >= 0, got -1", pace, step=-1),
    refused(TypeError, "step must be an integer, got float", pace, step=0.5),
    refused(ValueError, "n must be >= 1, got 0", pace, n=0),
    accepted(pace, total_steps=(np.int64(10), 10), step=(np.int64(3), 3)),
    refused(ValueError, "scores must be (N,) with N >= 1, got [6, 3]", CurriculumSampler, X,
            Pacing()),
    refused(ValueError, "scores must not be NaN", CurriculumSampler, X[0] * torch.nan, Pacing()),
    refused(TypeError, "pacing must be a Pacing or a function, got float", CurriculumSampler, X[0],
            0.5),
    refused(ValueError, "order must be one of curriculum, anti, random, got 'hard'",
            CurriculumSampler, X[0], Pacing(), "hard"),
    refused(ValueError, "min_size must be >= 1, got 0", CurriculumSampler, X[0], Pacing(),
            min_size=0),
    refused(ValueError, "step must be >= 0, got -1", CurriculumSampler(X[0], Pacing()).set_step,
            -1),
    refused(ValueError, "loader must give at least one batch", difficulty_scores, MODEL, []),
    refused(TypeError, "model must be a Module, got function", difficulty_scores, pace, []),
    refused(ValueError, "loss must give one number for each of 6 samples, got []; torch's losses do"
            " with reduction='none'", difficulty_scores, MODEL, [TEST],
            torch.nn.CrossEntropyLoss()),
    refused(ValueError, "6 samples are too few for 4 clients with 2 at least", dirichlet_split, Y,
            4, min_size=2),
    refused(ValueError, "alpha must be finite and > 0, got 0", dirichlet_split, Y, 2, 0),
    refused(TypeError, "labels must hold integers, got torch.float32", dirichlet_split, Y.float(),
            2),
    refused(ValueError, "clients must hold at least one client", simulate, MODEL, [], TEST),
    refused(ValueError, "clients[1] must hold at least one sample", simulate, MODEL,
            [TEST, (X[:0], Y[:0])], TEST),
    refused(ValueError, "the labels of test must have the shape [6], got [5]", simulate, MODEL,
            CLIENTS, (X, Y[:5])),
    refused(ValueError, "clients_per_round must be at most the 2 clients, got 3", simulate, MODEL,
            CLIENTS, TEST, clients_per_round=3),
    refused(ValueError, "score must be one of G, L, LG, E, got 'GL'", simulate, MODEL, CLIENTS,
            TEST, score="GL"),
    refused(ValueError, "expert is for score='E', which needs it", simulate, MODEL, CLIENTS, TEST,
            score="E"),
    refused(ValueError, "server_momentum must be in [0, 1), got 1", simulate, MODEL, CLIENTS, TEST,
            server_momentum=1),
    refused(TypeError, "client_pacing must be a Pacing or a function, got float", simulate, MODEL,
            CLIENTS, TEST, client_pacing=0.5),
    refused(ValueError, "n_components must be >= 1, got 0", PPCA, 0),
    refused(ValueError, "X must hold at least 2 rows, got [1, 3]", PPCA(2).fit, X[:1]),
    refused(TypeError, "X must be floating, got torch.int64", PPCA(2).fit, X.long()),
    refused(RuntimeError, "there is no fit yet: call fit first", PPCA(2).encode, X),
    refused(ValueError, "covariance must be one of diag, full, got 'tied'", GaussianMixture, 2,
            "tied"),
    refused(ValueError, "reg must be finite and >= 0, got -1", GaussianMixture, 2, reg=-1),
    refused(ValueError, "k must be >= 1, got 0", GaussianMixture, 0),
    refused(TypeError, "y must be floating, got torch.int64", LeastSquaresHead().fit, X, Y),
    refused(ValueError, "z and y must be finite", LeastSquaresHead().fit, X / 0, X[:, 0]),
    refused(ValueError, "y must be (6,) or (6, K), got [5]", LeastSquaresHead().fit, X, X[:5, 0]),
    refused(RuntimeError, "there is no fit yet: call fit first", LeastSquaresHead(), X),
    refused(IndexError, "y must be >= 0, got -1", ComponentHead().fit, X, Y - 1),
    refused(TypeError, "pretrainer must have encode(), got LeastSquaresHead", pretrain_then_erm,
            LeastSquaresHead(), LeastSquaresHead(), X, X, X[:, 0]),
    refused(TypeError, "head must have fit(), got Linear", pretrain_then_erm, PPCA(1), MODEL, X, X,
            X[:, 0]),
)  # fmt: skip
