"""Compiles a program for a pod without the pod, and reads what it will cost."""
