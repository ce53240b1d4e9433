"""The layout of Qwen-VL, Qwen-VL-Chat, their Int4 release and Qwen-7B."""
