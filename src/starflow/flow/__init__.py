"""The model, data to noise: configurations, blocks, STARFlow and TarFlow, their files, and what memory they take."""
