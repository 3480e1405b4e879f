"""How good a model is on rows: losses, scores, comparisons, and how sure one can be of them.

Example:
    from training_lens.evaluation import EvaluationSection, ModelEvaluator, find_run, open_run, validation_examples

    run = find_run("latest", "outputs", "default", finished=True)
    session = open_run(run)
    evaluator = ModelEvaluator(session, EvaluationSection(max_examples=200))
    whole = evaluator.compare(validation_examples(run, session)).comparison.whole
    print(whole.delta["loss"], whole.intervals["loss"])
"""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.config.evaluation_sections": ("EvaluationSection",),
        "training_lens.evaluation.comparison": ("LengthBuckets", "ModelComparison", "RowGroup"),
        "training_lens.evaluation.evaluator": (
            *("LossReport", "EvaluationOptions", "TokenSums", "evaluate_loss", "token_sums"),
        ),
        "training_lens.evaluation.run_evaluation": ("ModelEvaluator", "EvaluationResult"),
        "training_lens.evaluation.metrics": ("CORPUS_METRICS", "ROW_METRICS", "AnswerScoring", "row_scores"),
        "training_lens.evaluation.own_metrics": ("AnswerMetric", "metric"),
        "training_lens.evaluation.reports": ("write_reports",),
        "training_lens.evaluation.model_scores": ("Bootstrap", "ModelScores"),
        "training_lens.inference.heldout_examples": ("configured_examples", "validation_examples"),
        "training_lens.inference.session": ("open_run", "open_session"),
        "training_lens.runs.run_lookup": ("find_run",),
    },
)
