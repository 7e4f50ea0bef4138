"""Certificates for tests, made by openssl, and secrets as Kubernetes mounts them."""
import os
import subprocess


def openssl(*args):
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)


class Authority:
    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.cert, self.key = folder / f"{name}.crt", folder / f"{name}.key"
        self.issued = 0
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", 2,
                "-subj", f"/CN={name}", "-keyout", self.key, "-out", self.cert)

    def issue(self, names="DNS:localhost,IP:127.0.0.1", days=2):
        """PEM texts of a certificate and its key. Negative days: it has expired."""
        self.issued += 1
        stem = self.folder / f"{self.name}-{self.issued}"
        key, request, cert, extensions = (stem.with_suffix(s) for s in (".key", ".csr", ".crt", ".ext"))
        extensions.write_text(f"subjectAltName={names}\nbasicConstraints=critical,CA:FALSE\n")
        openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj",
                f"/CN=leaf-{self.issued}", "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key, "-days", days, "-extfile",
                extensions, "-out", cert)
        return cert.read_bytes(), key.read_bytes()

    @property
    def pem(self):
        return self.cert.read_bytes()


class SecretMount:
    """A folder whose files are links into ..data, itself a link that is exchanged at once: a mounted secret."""

    def __init__(self, folder, **files):
        self.folder, self.version = folder, 0
        folder.mkdir()
        self.write(**files)
        for name in files:
            (folder / name).symlink_to(f"..data/{name}")

    def __getitem__(self, name):
        return self.folder / name

    def write(self, **files):
        old = self.folder / f"..{self.version}"
        self.version += 1
        new = self.folder / f"..{self.version}"
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        (self.folder / "..data_tmp").symlink_to(new.name)
        os.rename(self.folder / "..data_tmp", self.folder / "..data")
        if old.exists():
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
