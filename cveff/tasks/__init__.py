"""Networks for other tasks than classification: torchvision's one-stage detectors and its segmentation networks."""
