"""What any training script needs: flags, files, a run's folder, console, figures, processes."""
