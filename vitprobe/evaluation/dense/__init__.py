"""Dense prediction: detection and segmentation on plain Vision Transformers."""
