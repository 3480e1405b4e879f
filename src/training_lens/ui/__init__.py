"""The dashboard: pages on which runs are watched, judged and compared, served from run folders."""
