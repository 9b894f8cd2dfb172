"""The studies that the command ``fastdg`` runs: their data, experiments, figures and tables."""
