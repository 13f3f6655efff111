"""Problems with verifiable answers: environments, their answers, long-context tasks."""
