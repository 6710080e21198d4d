"""python -m fastvae"""

from fastvae.cli.main import main

if __name__ == "__main__":
    main()
