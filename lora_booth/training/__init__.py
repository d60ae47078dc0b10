"""Training: photos -> `LatentCache` -> the loop of optimizer updates -> what a run keeps."""
