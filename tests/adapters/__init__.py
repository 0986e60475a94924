"""Every game for one player and every data set of the adapted packages, checked and trained on."""
