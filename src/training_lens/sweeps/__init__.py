"""Many runs of one question: which settings are best."""
