"""Problems with verifiable answers: environments, reading answers from completions, long-context tasks."""
