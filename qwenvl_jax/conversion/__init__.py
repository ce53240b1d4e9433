"""Released PyTorch layouts to parameter trees and back."""
