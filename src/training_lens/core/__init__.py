"""The lens: collectors, their schedule, the store of captures, and the callbacks that drive it.

Example:
    from training_lens.core import TrainingLensFramework

    lens = TrainingLensFramework("lens")
    trainer = SFTTrainer(model, args, train_dataset=rows, callbacks=[lens.trainer_callback()])
"""

from __future__ import annotations

from training_lens._lazy import attach

__getattr__, __dir__, __all__ = attach(
    {
        "training_lens.config.lens_section": ("LensSection",),
        "training_lens.core.capture": ("RunFacts",),
        "training_lens.core.collector": ("AnalyzerRegistry", "CaptureContext", "CollectorRegistry", "DataCollector"),
        "training_lens.core.framework": ("TrainingLensFramework",),
        "training_lens.integrations.delivery": ("Cursor", "Integration", "IntegrationManager", "IntegrationState"),
        "training_lens.core.probe": ("Probe",),
        "training_lens.core.recording": ("DataAnalyzer", "Recording"),
        "training_lens.core.lens_store": ("LensStore",),
        "training_lens.core.lens_writer": ("LensWriter",),
        "training_lens.core.types": ("Cadence", "Captured", "DataType", "Moment", "Series"),
    }
)
